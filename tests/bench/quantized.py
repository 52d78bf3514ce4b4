# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of random but valid bytes, as their own tools lay them out: what bench.py loads from."""
import json

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

GROUP = 128


class Maker:
    def __init__(self, count, rows, columns):
        self.count, self.rows, self.columns = count, rows, columns
        self.random = numpy.random.default_rng(1)

    def raw(self, *shape, dtype=torch.uint8):
        elements = int(numpy.prod(shape))
        return torch.frombuffer(bytearray(self.random.bytes(elements * dtype.itemsize)), dtype=dtype).reshape(shape)

    def fp8(self, *shape):
        """No NaN, whose codes have all bits but the sign."""
        raw = self.raw(*shape)
        raw[(raw & 0x7F) == 0x7F] = 0
        return raw.view(torch.float8_e4m3fn)

    def scales(self, *shape, dtype=torch.float32):
        return torch.from_numpy(self.random.uniform(0.001, 0.01, shape).astype(numpy.float32)).to(dtype)

    def powers(self, *shape):
        return torch.from_numpy(self.random.integers(110, 130, shape, dtype=numpy.uint8))

    # ---- the parts of one tensor, by the name of its module, and the quantization_config

    def plain(self, module):
        return {f"{module}.weight": self.scales(self.rows, self.columns, dtype=torch.bfloat16)}, None

    def fp8_block(self, module):
        return {f"{module}.weight": self.fp8(self.rows, self.columns), f"{module}.weight_scale_inv": self.scales(-(-self.rows // 128), -(-self.columns // 128))}, {"quant_method": "fp8", "weight_block_size": [128, 128]}

    def fp8_tensor(self, module):
        return {f"{module}.weight": self.fp8(self.rows, self.columns), f"{module}.weight_scale": self.scales(1)}, compressed("float-quantized", 8, "float", "tensor")

    def fp8_channel(self, module):
        return {f"{module}.weight": self.fp8(self.rows, self.columns), f"{module}.weight_scale": self.scales(self.rows, 1)}, compressed("float-quantized", 8, "float", "channel")

    def mxfp8(self, module):
        return {f"{module}.weight": self.fp8(self.rows, self.columns), f"{module}.weight_scale": self.powers(self.rows, self.columns // 32)}, compressed("mxfp8-quantized", 8, "float", "group", group_size=32)

    def mxfp4(self, module):
        return {f"{module}.weight_packed": self.raw(self.rows, self.columns // 2), f"{module}.weight_scale": self.powers(self.rows, self.columns // 32)}, compressed("mxfp4-pack-quantized", 4, "float", "group", group_size=32)

    def nvfp4(self, module):
        scales = (self.raw(self.rows, self.columns // 16) & 0x3F | 0x10).view(torch.float8_e4m3fn)
        return {f"{module}.weight": self.raw(self.rows, self.columns // 2), f"{module}.weight_scale": scales, f"{module}.weight_scale_2": self.scales()}, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}

    def int8_channel(self, module):
        return {f"{module}.weight": self.raw(self.rows, self.columns, dtype=torch.int8), f"{module}.weight_scale": self.scales(self.rows, 1)}, compressed("int-quantized", 8, "int", "channel")

    def int8_group(self, module):
        return {f"{module}.weight": self.raw(self.rows, self.columns, dtype=torch.int8), f"{module}.weight_scale": self.scales(self.rows, self.columns // GROUP)}, compressed("int-quantized", 8, "int", "group", group_size=GROUP)

    def int4_packed(self, module):
        return ({f"{module}.weight_packed": self.raw(self.rows, self.columns // 8, dtype=torch.int32), f"{module}.weight_scale": self.scales(self.rows, self.columns // GROUP, dtype=torch.bfloat16),
                 f"{module}.weight_shape": torch.tensor([self.rows, self.columns])}, compressed("pack-quantized", 4, "int", "group", group_size=GROUP))

    def gptq(self, module, ordered=False):
        groups = torch.arange(self.columns, dtype=torch.int32) // GROUP
        if ordered:
            groups = groups[torch.from_numpy(self.random.permutation(self.columns))]
        return ({f"{module}.qweight": self.raw(self.columns // 8, self.rows, dtype=torch.int32), f"{module}.qzeros": self.raw(self.columns // GROUP, self.rows // 8, dtype=torch.int32),
                 f"{module}.scales": self.scales(self.columns // GROUP, self.rows, dtype=torch.float16), f"{module}.g_idx": groups}, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": ordered, "sym": True})

    def gptq_act_order(self, module):
        return self.gptq(module, ordered=True)

    def awq(self, module):
        return ({f"{module}.qweight": self.raw(self.columns, self.rows // 8, dtype=torch.int32), f"{module}.qzeros": self.raw(self.columns // GROUP, self.rows // 8, dtype=torch.int32),
                 f"{module}.scales": self.scales(self.columns // GROUP, self.rows, dtype=torch.float16)}, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True})

    def nf4(self, module):
        """With scales that are quantized, too."""
        blocks = self.rows * self.columns // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [self.rows, self.columns], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        name = f"{module}.weight"
        return ({name: self.raw(self.rows * self.columns // 2, 1), f"{name}.absmax": self.raw(blocks), f"{name}.quant_map": torch.linspace(-1, 1, 16), f"{name}.nested_absmax": self.scales(-(-blocks // 256)),
                 f"{name}.nested_quant_map": torch.linspace(-1, 1, 256), f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)},
                {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True})

    # ---- checkpoints

    def safetensors(self, scheme, place, files=4):
        place.mkdir()
        weight_map, total = {}, 0
        for number in range(1, files + 1):
            name = f"model-{number:05}-of-{files:05}.safetensors"
            tensors = {}
            for t in range((number - 1) * self.count // files, number * self.count // files):
                parts, config = getattr(self, scheme)(f"layers.{t}")
                tensors |= parts
            save_file(tensors, place / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
        if config is not None:
            (place / "config.json").write_text(json.dumps({"quantization_config": config}))

    def gguf(self, kind, place):
        place.mkdir()
        writer = gguf.GGUFWriter(place / "model.gguf", "test")
        elements, size = gguf.GGML_QUANT_SIZES[Type[kind]]
        for t in range(self.count):
            blocks = numpy.frombuffer(bytearray(self.random.bytes(self.rows * self.columns // elements * size)), dtype=numpy.uint8).reshape(-1, size)
            for at in {"Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):   # scales that are numbers
                blocks[:, at:at + 2] = self.random.uniform(0.001, 0.01, (len(blocks), 1)).astype(numpy.float16).view(numpy.uint8).reshape(-1, 2)
            writer.add_tensor(f"layers.{t}.weight", blocks.reshape(self.rows, -1), raw_dtype=Type[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def compressed(form, bits, kind, strategy, **words):
    return {"quant_method": "compressed-tensors", "format": form, "ignore": [], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **words}}}}


SCHEMES = ("fp8_block", "fp8_tensor", "fp8_channel", "mxfp8", "mxfp4", "nvfp4", "int8_channel", "int8_group", "int4_packed", "gptq", "gptq_act_order", "awq", "nf4")
KINDS = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
