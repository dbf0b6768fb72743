"""Which tile the GPU kernel runs with.

launch      fp6::mm on a GPU: chooses a tile on every call        <- start here
choices     what a device is, and its tiles for a problem
tuned       tiles that were measured, tuned/<device>.json
selftest    whether wgmma computes right on this device
"""
