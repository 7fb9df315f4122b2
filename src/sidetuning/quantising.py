"""Fewer bits: weights by torchao, and weights and activations of an ONNX graph by ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sidetuning.errors import ShapeError, told

# Weights that share a scale in int4.
GROUP = 32
# Operators whose inputs and outputs are int8.
OPERATORS = ["Conv", "MatMul", "Gemm"]


def quantise_weights(net: nn.Module, precision: str) -> None:
    """Keep the weights of a network's linear layers in int8, a scale a row, or in int4, a scale for 32 of a row.

    Raises:
        ShapeError: it has no linear layer that can be.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ImportError as error:
        raise ImportError("weights in int8 and int4 need torchao: pip install 'sidetuning[quantised]'") from error
    group, bits = (GROUP, torch.int4) if precision == "int4" else (1, torch.int8)  # type: ignore[attr-defined]
    config = IntxWeightOnlyConfig(bits, PerGroup(group)) if group > 1 else Int8WeightOnlyConfig()
    chosen = {id(m) for m in net.modules() if type(m) is nn.Linear and m.in_features % group == 0}
    if not chosen:
        raise ShapeError(
            f"{type(net).__name__} has no linear layer to keep in {precision}; choose precision='bf16', or int8 by "
            "engine='onnxruntime', which takes convolutions too"
        )
    with told(f"torchao cannot keep this network in {precision} ({{}}); choose another precision="):
        quantize_(net, config, filter_fn=lambda module, name: id(module) in chosen)
    for parameter in net.parameters():
        parameter.requires_grad_(False)


def quantise_onnx(
    file: Path, to: Path | None, feeds: Sequence[Mapping[str, NDArray[Any]]], ranges: Mapping[str, list[float]] | None
) -> dict[str, list[float]]:
    """Write an ONNX file in int8, with weights of a scale a channel and activations of a fixed one.

    Args:
        file: the file in float32.
        to: where to write; None measures ranges alone.
        feeds: inputs to measure the ranges of activations on.
        ranges: what an earlier call has measured, instead.

    Raises:
        ShapeError: ONNX Runtime cannot, or the ranges are of another graph.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType, calibrate, qdq_quantizer, quant_utils
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(calibrate.CalibrationDataReader):  # type: ignore[misc]
        rows = iter(feeds)

        def get_next(self) -> Mapping[str, NDArray[Any]] | None:
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder, told("ONNX Runtime cannot run this base in int8 ({})"):
        # It would tell its authors' users how to do what is done here.
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Norms are folded first: they take no scales of their own.
                whole = Path(folder) / "whole.onnx"
                quant_pre_process(str(file), str(whole), skip_symbolic_shape=True)
                graph = quant_utils.load_model_with_shape_infer(whole)
                kinds = [node.op_type for node in graph.graph.node]
                # Sums of residual networks keep up; those of transformers have outliers, which no one scale fits.
                chosen = [*OPERATORS, "Add"] if kinds.count("Conv") > kinds.count("MatMul") else OPERATORS
                if ranges is None:
                    augmented = str(Path(folder) / "augmented.onnx")
                    measuring = calibrate.create_calibrator(whole, chosen, augmented_model_path=augmented)
                    measuring.collect_data(Reader())
                    found = measuring.compute_data().items()
                    ranges = {k: [float(f"{float(v.item()):.7g}") for v in data.range_value] for k, data in found}
                if to is not None:
                    bounds = {name: tuple(np.float32(value) for value in pair) for name, pair in ranges.items()}
                    known = calibrate.TensorsData(CalibrationMethod.MinMax, bounds)
                    types = QuantType.QInt8, QuantType.QUInt8
                    quantiser = qdq_quantizer.QDQQuantizer(graph, True, False, *types, known, [], [], chosen, {})
                    quantiser.quantize_model()
                    quantiser.model.save_model_to_file(str(to), False)
        finally:
            logging.disable(before)
    return dict(ranges)
