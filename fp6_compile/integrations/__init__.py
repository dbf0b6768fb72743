"""The package inside other libraries. Each is a package of its own, and imports its library only where that library asks.

vllm    a plug-in of vLLM: quantization method "fp6"
"""
