"""A small language model of Python source, trained here on the standard library: a real model to compress."""
