# `just check` is exactly what CI runs; `just test` the tests; `just bench` the ratios, `just tables` the README's table,
# `just kernels` the page of the CUDA kernels.

# Compiled once, torch and the rest start in half the time, and tests start many processes.
export PYTHONDONTWRITEBYTECODE := ""

# Everything that must hold before a change lands.
check: static test

# What is read of the sources, at once.
[parallel]
static: lint types

# Formatting and lints of both languages.
lint:
    cargo fmt --check
    cargo clippy --locked --profile bench --features python --all-targets -- -D warnings
    ruff format --check python tests bench examples
    ruff check python tests bench examples

# Types, and the core's stub held against the module.
types:
    mypy
    python -m mypy.stubtest ftkit._core

# The tests of both languages.
test:
    cargo test --locked --quiet --profile bench
    OMP_NUM_THREADS=1 pytest -n auto --maxprocesses 4 --dist worksteal

# Runs every CUDA kernel on this machine's GPU: is it right, and how fast? Without one it says so and exits with 2.
gpu:
    ftkit doctor --gpu

# Ratios against peers, printed; opt-in and slow.
bench *names:
    python -m bench {{ names }}

# Writes the README's tables anew: formats with perplexity, KL and speed, and what fits on a GPU; in some minutes.
tables:
    python -m bench._tables
    python -m bench._plans

# Writes docs/kernels.md anew: what the CUDA kernels' machine code says of their speed.
kernels:
    python -m bench._kernels

# Rewrites the sources in the house's format.
format:
    cargo fmt
    ruff format python tests bench examples
    ruff check --fix python tests bench examples
