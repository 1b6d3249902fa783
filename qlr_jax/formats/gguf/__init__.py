"""GGUF: the blocks that hold our integers exactly, the container file, the tokenizer's metadata, and the export."""
