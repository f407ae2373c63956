"""The Triton backend: importing it needs triton, using it a GPU or an interpreter."""
