// Switching between stacks: a thread of the kernel is a fiber of the process.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && !defined(ON_CPU_UCONTEXT)
extern "C" void on_cpu_switch(void** from, void* to);
__asm__(
    ".text\n.globl on_cpu_switch\n.type on_cpu_switch,@function\non_cpu_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");

namespace on_cpu {
inline void switch_stack(void** from, void* to) { on_cpu_switch(from, to); }
inline void* new_stack(char* stack, size_t bytes, void (*start)()) {
  void** top = (void**)(stack + bytes - 64);
  *--top = nullptr;
  *--top = (void*)start;
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  return top;
}
}  // namespace on_cpu
#else  // slower by a system call a switch, but everywhere
#include <ucontext.h>

namespace on_cpu {
inline void switch_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, (ucontext_t*)to);
}
inline void* new_stack(char* stack, size_t bytes, void (*start)()) {
  ucontext_t* made = (ucontext_t*)stack;
  getcontext(made);
  made->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  made->uc_stack.ss_size = bytes - sizeof(ucontext_t);
  made->uc_link = nullptr;
  makecontext(made, start, 0);
  return made;
}
}  // namespace on_cpu
#endif
