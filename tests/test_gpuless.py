"""The judgement of `benchmarks.gpuless` on a trace; the device itself runs by `make gpuless`."""

from benchmarks import gpuless

TRACE = """MALLOC 4096
SYNC device
MARK step
KERNEL aten grid=1,1,1 block=128,1,1 shared=0 add
KERNEL gemm cublasLt compute=68 TN A=1x2:14
KERNEL triton grid=1,1,1 block=128,1,1 shared=0 triton_poi_fused_0
GRAPH launch
COPY P->D 64
COPY D->H 4 WAITS
MARK end
SYNC device
"""
ROW = {"launches": 100, "products": 10, "graphs": 7, "inductor_mb": 50, "waits": 0, "illegal": 0, "late_graphs": 0,
       "peak_gb": 10.0, "need_gb": 11.0}  # fmt: skip


def test_only_the_marked_step_is_counted():
    assert gpuless.counts(TRACE) == {"launches": 4, "products": 1, "waits": 1, "illegal": 0}
    assert gpuless.counts("CAPTURE-ILLEGAL cudaStreamSynchronize\n" + TRACE)["illegal"] == 1


def test_a_step_within_its_budget_passes_and_one_that_spends_more_does_not():
    assert gpuless.judge(ROW, ROW) == [] == gpuless.judge(ROW, None)
    for column in gpuless.COUNTED:
        (said,) = gpuless.judge(ROW | {column: ROW[column] * 1.5}, ROW)
        assert column in said and "spend less" in said


def test_waits_late_graphs_and_a_wrong_estimate_fail_without_a_budget():
    for changed in ({"waits": 1}, {"illegal": 2}, {"late_graphs": 1}, {"need_gb": 8.0}, {"need_gb": 12.0}):
        assert len(gpuless.judge(ROW | changed, None)) == 1, changed
    assert gpuless.judge({"error": "ended with 1: no"}, ROW) == ["ended with 1: no"]


def test_the_budget_is_of_cases_that_there_are():
    assert gpuless.read_budget().keys() <= gpuless.CASES.keys()
