// loss = log Σ exp(z) − z[target] of each row of logits, and with GRADIENT its gradient softmax(z) − [v = target].
//
// A block makes a row of `vocabulary` logits; sums are float32, of exp(z − the row's greatest). A thread's sum is of
// exp(z − its greatest so far), so that the row is read once for the loss; with a gradient, which a row of many logits
// leaves no cache for, once more. A target that isn't a token gives NaN. VALUE: float, bf16, half.
#include "block.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(const VALUE* __restrict__ logits, const int64_t* __restrict__ targets, float* __restrict__ losses,
                  VALUE* __restrict__ gradient, int vocabulary) {
  __shared__ float parts[THREADS / 32];
  const int64_t row = (int64_t)blockIdx.x * vocabulary;
  float own = -__uint_as_float(0x7f7fffffu), sum = 0.0f;  // finite: logits may be −∞
#pragma unroll 4
  for (int v = threadIdx.x; v < vocabulary; v += THREADS) {
    const float z = wide(logits[row + v]);
    if (z > own) {
      sum *= expf(own - z);
      own = z;
    }
    sum += expf(z - own);
  }
  const float most = block_max<THREADS>(own, parts);
  sum = block_sum<THREADS>(sum * expf(own - most), parts);
  const int64_t target = targets[blockIdx.x];
  if (threadIdx.x == 0) {
    const bool known = target >= 0 && target < vocabulary;
    losses[blockIdx.x] = known ? logf(sum) + most - wide(logits[row + target]) : __uint_as_float(0x7fc00000u);
  }
  if (GRADIENT) {
    const float inverse = 1.0f / sum;
#pragma unroll 4
    for (int v = threadIdx.x; v < vocabulary; v += THREADS)
      gradient[row + v] = narrow<VALUE>(expf(wide(logits[row + v]) - most) * inverse - (v == target ? 1.0f : 0.0f));
  }
}
