"""The pack's own wire types. Where ComfyUI has one (IMAGE, LATENT, SIGMAS, CONDITIONING ...), that one is used."""

from __future__ import annotations

from .api import io

Restorer = io.Custom("MEND_RESTORER")
"""A loaded network, as it travels: `engine.loaded.LoadedRestorer`."""
Routing = io.Custom("MEND_ROUTING")
"""MoCE-IR's choice per decoder block: logits, probabilities, experts."""
Degradation = io.Custom("MEND_DEGRADATION")
"""What is wrong with the picture: class probabilities and/or a method's embedding."""
Residual = io.Custom("MEND_RESIDUAL")
"""DA-RCOT's first-pass residual and its embeddings."""
Features = io.Custom("MEND_FEATURES")
"""Feature maps of an encoder-decoder network."""
Operator = io.Custom("MEND_OPERATOR")
"""A linear degradation A."""
Measurement = io.Custom("MEND_MEASUREMENT")
"""An observation y = A x + noise with its noise level."""
Prior = io.Custom("MEND_PRIOR")
"""A denoiser x, sigma -> x0."""
Codec = io.Custom("MEND_CODEC")
"""A codec network."""
Bitstream = io.Custom("MEND_BITSTREAM")
"""Compressed bytes with size, quality and rate."""
Dataset = io.Custom("MEND_DATASET")
"""Training pairs."""
Objective = io.Custom("MEND_OBJECTIVE")
"""A training method."""
FaceEmbedder = io.Custom("MEND_FACE_EMBEDDER")
"""The network that turns a face into a prompt: `engine.osdface.FaceEmbedder`."""
Faces = io.Custom("MEND_FACES")
"""Where the faces of a batch lie, and how each was cut out: `engine.faces.Faces`."""
Segments = io.Custom("SEGS")
"""The Impact Pack's segments: (shape, [segment with a bbox, ...])."""
Conditioner = io.Custom("MEND_CONDITIONER")
"""GenDeg's layers that bring an intensity into CONDITIONING: `engine.loaded.LoadedRestorer`."""
Degrader = io.Custom("MEND_DEGRADER")
"""What paints damage into pictures: `engine.degraders.Degrader`."""
Shots = io.Custom("MEND_SHOTS")
"""Where the shots of a video begin: numbers of their first frames."""
