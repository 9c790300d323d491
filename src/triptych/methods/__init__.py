"""Methods: the only list.  A method is found by the `name` of its config."""

from typing import Annotated

from pydantic import Field

from triptych.encoders.base import Encoder
from triptych.methods.base import Method
from triptych.methods.byol import BYOLConfig
from triptych.methods.dino import DINOConfig
from triptych.methods.gmml import GMML, GMMLConfig
from triptych.methods.hssl import HSSLConfig
from triptych.methods.ibot import iBOTConfig
from triptych.methods.mae import MAE, MAEConfig
from triptych.methods.mcssl import MCSSLConfig
from triptych.methods.mmc import MMCConfig
from triptych.methods.moby import MoBYConfig
from triptych.methods.mocov3 import MoCoV3Config
from triptych.methods.msn import MSNConfig
from triptych.methods.mte import BASES, MTE, BaseConfig, MTEConfig
from triptych.methods.simclr import SimCLRConfig
from triptych.methods.sit import SiTConfig
from triptych.methods.supervised import Supervised, SupervisedConfig
from triptych.methods.swav import SwAVConfig
from triptych.methods.udi import UDIConfig

MethodConfig = Annotated[
    BaseConfig | MTEConfig | MAEConfig | GMMLConfig | SupervisedConfig, Field(discriminator="name")
]
METHODS: dict[type, type[Method]] = {
    **BASES,
    MTEConfig: MTE,
    MAEConfig: MAE,
    GMMLConfig: GMML,
    SupervisedConfig: Supervised,
}

__all__ = [
    "BASES",
    "METHODS",
    "BYOLConfig",
    "DINOConfig",
    "GMMLConfig",
    "HSSLConfig",
    "MAEConfig",
    "MCSSLConfig",
    "MMCConfig",
    "MSNConfig",
    "MTEConfig",
    "Method",
    "MethodConfig",
    "MoBYConfig",
    "MoCoV3Config",
    "SiTConfig",
    "SimCLRConfig",
    "SupervisedConfig",
    "SwAVConfig",
    "UDIConfig",
    "build",
    "iBOTConfig",
]


def build(encoder: Encoder, config: MethodConfig) -> Method:
    """The method that `config` describes, around an encoder built with its `token_spec(config)`."""
    return METHODS[type(config)](encoder, config)  # type: ignore[call-arg]
