"""Six-bit matmuls on this CPU beside F.linear and torch's int8 and int4: `python -m benchmarks.cpu`.

providers  who multiplies
plot       a picture of the results: `python -m benchmarks.cpu.plot RESULT.json`
"""
