# Made by `make stubs`.
from eckart.methods.compress.svd import SVD as SVD
from eckart.methods.objective.distill import Distill as Distill
from eckart.methods.objective.orthogonality import Orthogonality as Orthogonality
from eckart.methods.precision.bf16 import BF16 as BF16
from eckart.methods.precision.fp32 import FP32 as FP32
from eckart.methods.update.adamw import AdamW as AdamW
from eckart.methods.update.galore import GaLore as GaLore
from eckart.methods.weights.block_lora import BlockLoRA as BlockLoRA
from eckart.methods.weights.bone import Bone as Bone
from eckart.methods.weights.dense import Dense as Dense
from eckart.methods.weights.dora import DoRA as DoRA
from eckart.methods.weights.lora import LoRA as LoRA
from eckart.methods.weights.lora_sb import LoRASB as LoRASB
from eckart.methods.weights.lowrank import LowRank as LowRank
