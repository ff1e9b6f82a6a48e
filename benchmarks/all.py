"""Measure every row that has a target: `python -m benchmarks.all --device cpu|cuda [--output JSON] [--only ROW]`.

Each row checks correctness first, then measures times (contenders take turns), peak memory and limits. On two CPU cores
this takes less than ten minutes. The last table says for every target whether it is met. `--engines` measures inference
beside ONNX Runtime and OpenVINO instead; it needs the extra `bench` and takes as long.
"""

from benchmarks import bench_encoder, bench_engines, bench_train_step
from benchmarks.ops import (
    bench_contrastive_loss,
    bench_gumbel_quantize,
    bench_integrate_and_fire,
    bench_strided_conv,
    bench_varlen_attention,
)
from benchmarks.report import Rows, main
from benchmarks.targets import TARGETS

ROWS: Rows = {
    **bench_train_step.ROWS,
    **bench_encoder.ROWS,
    **bench_strided_conv.ROWS,
    **bench_contrastive_loss.ROWS,
    **bench_gumbel_quantize.ROWS,
    **bench_integrate_and_fire.ROWS,
    **bench_varlen_attention.ROWS,
    **bench_engines.ROWS,
}

if __name__ == "__main__":
    promised = {device: list(dict.fromkeys(target.row for target in targets)) for device, targets in TARGETS.items()}
    main(ROWS, __doc__, by_default=promised, groups={"engines": list(bench_engines.ROWS)})
