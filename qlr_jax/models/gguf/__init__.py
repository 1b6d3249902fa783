"""Models in GGUF files, llama.cpp's format, read as what a Hugging Face folder holds.

file       which file is meant, its metadata, its tensors' places      config      metadata -> config.json
names      a tensor's name and order of rows, in both directions       rope        divisors of frequencies -> llama3's numbers
tensors    blocks -> float32, one tensor at a time                     tokenizer   metadata -> tokenizer.json and what is beside it
pre_tokenizers   how text is cut before pairs are merged, by llama.cpp's names
"""
