"""transformers: from_pretrained quantizes while it loads and loads packed folders; save_pretrained writes them.

config      Fp6Config: what the user asks for, and what config.json says          <- start here
quantizer   transformers' quantizer: which weights are packed, what happens before and after loading
plan        which weights of an empty model will be packed, and why others will not
loading     a checkpoint -> packed weights
saving      a packed model -> tensors and metadata for save_pretrained
register    makes transformers know all this
names       names of transformers that its documentation does not promise
"""
