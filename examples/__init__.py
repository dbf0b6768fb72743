"""Scripts to read and to run: `python -m examples.demo`.

demo            a trained model in six bits beside itself in sixteen: quality, text, time     <- start here
decode_latency  milliseconds per token of a decode loop
graph_picture   the graph before and after the backend's pass, as a picture
code_lm         a small language model of Python source, with its weights and its training
"""
