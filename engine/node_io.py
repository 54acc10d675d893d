"""The built-in twin of `comfy_api.latest.io`: what a node says about itself, and what it returns.

Outside ComfyUI the nodes of this pack are declared with these classes; inside, with ComfyUI's. Both accept the same
keywords, raise the same errors and describe a node to the page in the same words, so that a node written against one
runs under the other. Only what the pack uses is here.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch


class FolderType(str, Enum):
    """Where a file lies, as the page names it."""

    input = "input"
    output = "output"
    temp = "temp"


class UploadType(str, Enum):
    """What the upload button of a combo takes; the value is the option that asks the page for the button."""

    image = "image_upload"
    audio = "audio_upload"
    video = "video_upload"
    model = "file_upload"


class NumberDisplay(str, Enum):
    """How the page draws a number."""

    number = "number"
    slider = "slider"


class Hidden(str, Enum):
    """Values that the engine hands to a node without a socket; read as `cls.hidden.<name>`."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"
    auth_token_comfy_org = "AUTH_TOKEN_COMFY_ORG"
    api_key_comfy_org = "API_KEY_COMFY_ORG"


class HiddenHolder:
    """The hidden values of one call; one that was not asked for reads as None."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> None:
        return None

    @classmethod
    def from_dict(cls, values: dict[Hidden, Any] | None) -> HiddenHolder:
        return cls(**{Hidden(key).name: value for key, value in (values or {}).items()})


class ExecutionBlocker:
    """Travels along a wire in place of a value and stops every node it reaches; a message is reported once."""

    def __init__(self, message: str | None) -> None:
        self.message = message


# Sockets and widgets --------------------------------------------------------------------------------------------------


class _Slot:
    """One end of a wire. `_options` names the keywords of the constructor and what the page calls them."""

    Parent: ClassVar[type[ComfyType]]
    _options: ClassVar[dict[str, str]] = {}
    _defaults: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _collect(cls, table: str) -> dict[str, Any]:
        return {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get(table, {}).items()}

    def __init__(self, id: str | None = None, **values: Any) -> None:
        self.id = id
        defaults = self._collect("_defaults")
        for name in self._collect("_options"):
            setattr(self, name, values.pop(name, defaults.get(name)))
        if values:
            unknown = ", ".join(repr(name) for name in values)
            raise TypeError(
                f"{self.Parent.__name__}.{type(self).__name__} got an unexpected keyword argument {unknown}"
            )

    @property
    def io_type(self) -> str:
        return self.Parent.io_type

    def get_io_type(self) -> str:
        """The type as it stands in the page's description of the node."""
        return self.io_type

    def as_dict(self) -> dict[str, Any]:
        """The options for the page, without those left unset."""
        found = {shown: getattr(self, name) for name, shown in self._collect("_options").items()}
        return {k: v.value if isinstance(v, Enum) else v for k, v in found.items() if v is not None}


class Input(_Slot):
    """An input. `optional` ones are absent from the call when nothing is connected; `lazy` ones come on demand."""

    _options = {"display_name": "display_name", "optional": "optional", "tooltip": "tooltip", "lazy": "lazy"}
    _defaults = {"optional": False}

    def __init__(self, id: str, *, extra_dict: dict[str, Any] | None = None, **values: Any) -> None:
        super().__init__(id, **values)
        self.extra_dict = extra_dict or {}

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.extra_dict.items() if v is not None} | super().as_dict()


class WidgetInput(Input):
    """An input whose value can be typed on the node."""

    _options = {
        "default": "default",
        "socketless": "socketless",
        "widget_type": "widgetType",
        "force_input": "forceInput",
    }

    def get_io_type(self) -> str:
        return self.widget_type or super().get_io_type()


class Output(_Slot):
    """An output. With `is_output_list` the following nodes run once per item."""

    _options = {"display_name": "display_name", "tooltip": "tooltip", "is_output_list": "is_output_list"}
    _defaults = {"is_output_list": False}


class ComfyType:
    """A wire type: its name and the classes of its two ends."""

    io_type: ClassVar[str]
    Type: ClassVar[Any] = Any
    Input: ClassVar[type[Input]] = Input
    Output: ClassVar[type[Output]] = Output

    def __init_subclass__(cls, io_type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if io_type is not None:
            cls.io_type = io_type
        cls.Input = type("Input", (cls.Input,), {"Parent": cls})
        cls.Output = type("Output", (cls.Output,), {"Parent": cls})


def Custom(io_type: str) -> type[ComfyType]:
    """A wire type of our own."""
    return type(io_type, (ComfyType,), {}, io_type=io_type)


class Boolean(ComfyType, io_type="BOOLEAN"):
    Type = bool

    class Input(WidgetInput):
        _options = {"label_on": "label_on", "label_off": "label_off"}


class Int(ComfyType, io_type="INT"):
    Type = int

    class Input(WidgetInput):
        _options = {
            "min": "min",
            "max": "max",
            "step": "step",
            "control_after_generate": "control_after_generate",
            "display_mode": "display",
        }


class Float(ComfyType, io_type="FLOAT"):
    Type = float

    class Input(WidgetInput):
        _options = {"min": "min", "max": "max", "step": "step", "round": "round", "display_mode": "display"}


class String(ComfyType, io_type="STRING"):
    Type = str

    class Input(WidgetInput):
        _options = {"multiline": "multiline", "placeholder": "placeholder", "dynamic_prompts": "dynamicPrompts"}
        _defaults = {"multiline": False}


class Combo(ComfyType, io_type="COMBO"):
    Type = str

    class Input(WidgetInput):
        _options = {
            "multiselect": "multiselect",
            "options": "options",
            "control_after_generate": "control_after_generate",
            "image_folder": "image_folder",
        }
        _defaults = {"multiselect": False}

        def __init__(self, id: str, options: Any = None, *, upload: UploadType | None = None, **values: Any) -> None:
            if isinstance(options, type) and issubclass(options, Enum):
                options = [member.value for member in options]
            if isinstance(values.get("default"), Enum):
                values["default"] = values["default"].value
            super().__init__(id, options=options, **values)
            self.upload = upload

        def as_dict(self) -> dict[str, Any]:
            return super().as_dict() | ({self.upload.value: True} if self.upload is not None else {})

    class Output(Output):
        def __init__(self, id: str | None = None, *, options: list[str] | None = None, **values: Any) -> None:
            super().__init__(id, **values)
            self.options = options or []

        @property
        def io_type(self) -> list[str]:  # a list of values is how ComfyUI types such a wire
            return self.options


class Image(ComfyType, io_type="IMAGE"):
    Type = torch.Tensor


class Mask(ComfyType, io_type="MASK"):
    Type = torch.Tensor


class Latent(ComfyType, io_type="LATENT"):
    Type = dict


class Conditioning(ComfyType, io_type="CONDITIONING"):
    Type = list


class Sigmas(ComfyType, io_type="SIGMAS"):
    Type = torch.Tensor


class Sampler(ComfyType, io_type="SAMPLER"): ...


class Noise(ComfyType, io_type="NOISE"): ...


class Guider(ComfyType, io_type="GUIDER"): ...


class Model(ComfyType, io_type="MODEL"): ...


class Clip(ComfyType, io_type="CLIP"): ...


class Vae(ComfyType, io_type="VAE"): ...


class ClipVision(ComfyType, io_type="CLIP_VISION"): ...


class ClipVisionOutput(ComfyType, io_type="CLIP_VISION_OUTPUT"): ...


class ControlNet(ComfyType, io_type="CONTROL_NET"): ...


class UpscaleModel(ComfyType, io_type="UPSCALE_MODEL"): ...


class LoraModel(ComfyType, io_type="LORA_MODEL"): ...


class LossMap(ComfyType, io_type="LOSS_MAP"): ...


class Audio(ComfyType, io_type="AUDIO"): ...


class Video(ComfyType, io_type="VIDEO"): ...


class AnyType(ComfyType, io_type="*"): ...


class MultiType(ComfyType, io_type="COMFY_MULTITYPED_V3"):
    """An input that takes any of several types; given a widget input instead of an id, it keeps that widget."""

    class Input(Input):
        def __init__(self, id: str | Input, types: list[Any], **values: Any) -> None:
            widget = None
            if isinstance(id, _Slot):
                widget, id = copy.copy(id), id.id
                for name in ("display_name", "tooltip", "lazy", "optional"):
                    values[name] = getattr(widget, name) or values.get(name, Input._collect("_defaults").get(name))
                if isinstance(widget, WidgetInput):
                    widget.widget_type = widget.get_io_type()
            super().__init__(id, **values)
            self.widget, self.types = widget, types

        def get_io_type(self) -> str:
            names = [] if self.widget is None else [self.widget.get_io_type()]
            return ",".join(dict.fromkeys([*names, *(t.io_type for t in self.types)]))

        def as_dict(self) -> dict[str, Any]:
            return (self.widget.as_dict() if self.widget is not None else {}) | super().as_dict()


# A node ---------------------------------------------------------------------------------------------------------------


@dataclass
class Schema:
    """Everything that the menu, the page and the engine want to know about a node."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] | None = None
    outputs: list[Output] | None = None
    hidden: list[Hidden] | None = None
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False

    def validate(self) -> None:
        """Raises ValueError unless the ids of inputs and outputs are unique, apart and together."""
        inputs, outputs = ([slot.id for slot in side or []] for side in (self.inputs, self.outputs))
        issues = []
        for name, ids in (("Input", inputs), ("Output", outputs)):
            twice = [key for key, count in Counter(ids).items() if count > 1]
            if twice:
                issues.append(f"{name} ids must be unique, but {twice} are not.")
        shared = set(inputs) & set(outputs)
        if shared:
            issues.append(f"Ids must be unique between inputs and outputs, but {shared} are not.")
        if issues:
            raise ValueError("\n".join(issues))

    def finalize(self) -> None:
        """Adds what output nodes get unasked, and ids for outputs that have none."""
        if self.is_output_node:
            asked = self.hidden or []
            self.hidden = [*asked, *(h for h in (Hidden.prompt, Hidden.extra_pnginfo) if h not in asked)]
        for position, output in enumerate(self.outputs or []):
            if output.id is None:
                output.id = f"_{position}_{output.io_type}_"

    def input_types(self) -> dict[str, dict[str, tuple]]:
        """{"required" | "optional" | "hidden": {id: (type, options)}}."""
        found: dict[str, dict[str, tuple]] = {"required": {}}
        for slot in self.inputs or []:
            options = slot.as_dict()
            options.pop("optional", None)
            found.setdefault("optional" if slot.optional else "required", {})[slot.id] = (slot.get_io_type(), options)
        for hidden in self.hidden or []:
            found.setdefault("hidden", {})[hidden.name] = (hidden.value,)
        return found


class _FromSchema:
    """A class attribute read from the node's schema."""

    def __init__(self, read: Callable[[Schema], Any]) -> None:
        self.read = read

    def __get__(self, instance: Any, owner: type[ComfyNode]) -> Any:
        return self.read(owner.GET_SCHEMA())


class _Locked(type):
    """Metaclass of the class that a node's methods get as `cls`: state on it would be lost, so setting it raises."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"Cannot modify class attribute '{name}' on locked class '{cls.__name__}'")


class ComfyNode:
    """Base class of nodes: `define_schema` and `execute`, and where needed one of the three below.

    `validate_inputs` gets the constants it names before anything runs and returns True or what is wrong;
    `fingerprint_inputs` gets every input by name and returns something that changes when the node must run again;
    `check_lazy_status` returns the names of lazy inputs still needed.
    """

    RELATIVE_PYTHON_MODULE: ClassVar[str | None] = None
    hidden: ClassVar[HiddenHolder | None] = None

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **kwargs: Any) -> NodeOutput:
        raise NotImplementedError

    @classmethod
    def overridden(cls, method: str) -> Callable | None:
        """The method if a subclass of ComfyNode defines it."""
        found = getattr(cls, method)
        return None if found.__func__ is vars(ComfyNode)[method].__func__ else found

    @classmethod
    def validate_inputs(cls, **kwargs: Any) -> bool | str:
        raise NotImplementedError

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def check_lazy_status(cls, **kwargs: Any) -> list[str]:
        return [name for name, value in kwargs.items() if value is None]

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The finished and checked schema."""
        for method in ("define_schema", "execute"):
            if cls.overridden(method) is None:
                raise Exception(f"No {method} function was defined for node class {cls.__name__}.")
        schema = cls.define_schema()
        schema.finalize()
        schema.validate()
        return schema

    @classmethod
    def INPUT_TYPES(cls, include_hidden: bool = True) -> dict[str, dict[str, tuple]]:
        """The inputs in the older form: {"required" | "optional" | "hidden": {id: (type, options)}}."""
        found = cls.GET_SCHEMA().input_types()
        if not include_hidden:
            found.pop("hidden", None)
        return found

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict[str, Any]:
        """The entry of this node in what the server lists under /object_info."""
        schema, inputs, outputs = cls.GET_SCHEMA(), cls.INPUT_TYPES(), cls.GET_SCHEMA().outputs or []
        return {
            "input": inputs,
            "input_order": {group: list(entries) for group, entries in inputs.items()},
            "output": [o.io_type for o in outputs],
            "output_is_list": [o.is_output_list for o in outputs],
            "output_name": [o.display_name or o.io_type for o in outputs],
            "output_tooltips": [o.tooltip or None for o in outputs],
            "name": schema.node_id,
            "display_name": schema.display_name,
            "description": schema.description,
            "python_module": cls.RELATIVE_PYTHON_MODULE,
            "category": schema.category,
            "output_node": schema.is_output_node,
            "deprecated": schema.is_deprecated,
            "experimental": schema.is_experimental,
            "api_node": schema.is_api_node,
        }

    DESCRIPTION = _FromSchema(lambda s: s.description)
    CATEGORY = _FromSchema(lambda s: s.category)
    OUTPUT_NODE = _FromSchema(lambda s: s.is_output_node)
    INPUT_IS_LIST = _FromSchema(lambda s: s.is_input_list)
    OUTPUT_IS_LIST = _FromSchema(lambda s: [o.is_output_list for o in s.outputs or []])
    RETURN_TYPES = _FromSchema(lambda s: [o.io_type for o in s.outputs or []])
    RETURN_NAMES = _FromSchema(lambda s: [o.display_name or o.io_type for o in s.outputs or []])
    NOT_IDEMPOTENT = _FromSchema(lambda s: s.not_idempotent)

    @classmethod
    def PREPARE_CLASS_CLONE(cls, hidden_inputs: dict[Hidden, Any] | None) -> type[ComfyNode]:
        """The locked class that one call gets as `cls`, with its hidden values."""
        return _Locked(cls.__name__, (cls,), {"hidden": HiddenHolder.from_dict(hidden_inputs)})

    @classmethod
    async def run(cls, hidden_inputs: dict[Hidden, Any] | None, **inputs: Any) -> NodeOutput:
        """Calls `execute` on a locked clone, awaits it if need be, and brings what it returns into one form."""
        returned = cls.PREPARE_CLASS_CLONE(hidden_inputs).execute(**inputs)
        output = NodeOutput.normalise(await returned if inspect.isawaitable(returned) else returned)
        if output.expand is not None and not cls.GET_SCHEMA().enable_expand:
            raise Exception(
                f"Node {cls.__name__} is not expandable, but expand included in NodeOutput; developer should set "
                "enable_expand=True on node's Schema to allow this."
            )
        return output


class NodeOutput:
    """What `execute` returns: the outputs in order, and what the page shows (`ui`).

    `expand` is a graph that takes the node's place; `block_execution` stops the nodes that follow, with a message.
    """

    def __init__(
        self, *args: Any, ui: Any = None, expand: dict | None = None, block_execution: str | None = None
    ) -> None:
        self.args, self.ui, self.expand, self.block_execution = args, ui, expand, block_execution

    @property
    def result(self) -> tuple | None:
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]

    @classmethod
    def normalise(cls, returned: Any) -> NodeOutput:
        """None, a tuple, a blocker or a NodeOutput as a NodeOutput. A dict raises, as it does in ComfyUI 0.3.64."""
        if returned is None:
            return cls()
        if isinstance(returned, cls):
            return returned
        if isinstance(returned, tuple):
            return cls(*returned)
        if isinstance(returned, ExecutionBlocker):
            return cls(block_execution=returned.message)
        if isinstance(returned, dict):
            raise TypeError("a node must return io.NodeOutput(..., ui=..., expand=...), not a dict")
        raise Exception(f"Invalid return type from node: {type(returned)}")
