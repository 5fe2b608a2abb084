"""Ways to bring an adapter into a file that holds its matrices in few bits: one file a way.

A way has `made(material, kind, rank) -> Material`: of the live model with its adapter merged, and the type of GGUF file
to write, what is written, and with it the adapter that goes beside the file, where there is one; `rank` is that of a
LoRA that the way makes itself. Which is best is measured and not assumed: `ftkit merge --compare` does.
"""
