"""Checkpoints in the format of the Hugging Face Hub, in and out: one file a family.

folder --reading--> (family, config.json, tensors) --Family's maps--> Transformer
Transformer --family_for--> Family --writing--> folder that transformers loads
"""
