"""The bitstream container and entropy coding around the all-in-one codec."""
