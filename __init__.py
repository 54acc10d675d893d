"""ComfyUI-Mend: image restoration methods as ComfyUI nodes."""

from __future__ import annotations

WEB_DIRECTORY = "./web"

if __package__ and __package__ != "comfyui_mend":  # loaded by ComfyUI under a name of its own
    from .nodes import MendExtension

    async def comfy_entrypoint() -> MendExtension:
        """ComfyUI's entry point."""
        return MendExtension()
