"""Methods: the only list.  A method is found by the `name` of its config."""

from typing import Annotated

from pydantic import Field

from triptych.encoders.base import Encoder
from triptych.methods.base import Method
from triptych.methods.dino import DINO, DINOConfig
from triptych.methods.udi import UDI, UDIConfig

MethodConfig = Annotated[DINOConfig | UDIConfig, Field(discriminator="name")]
METHODS: dict[type, type[Method]] = {DINOConfig: DINO, UDIConfig: UDI}

__all__ = ["METHODS", "Method", "MethodConfig", "build"]


def build(encoder: Encoder, config: DINOConfig | UDIConfig) -> Method:
    """The method that `config` describes, around an encoder built with METHODS[type(config)].tokens."""
    return METHODS[type(config)](encoder, config)  # type: ignore[call-arg]
