"""GGUF, llama.cpp's format: integers that its blocks represent exactly, everything else as plain numbers.

export       model.gguf and adapter.gguf of a packed folder
blocks       codes and scales -> blocks               tokenizer    a tokenizer -> metadata
writer       metadata and tensors -> a file

Names and orders of rows, which reading needs too, are in models/gguf.
"""
