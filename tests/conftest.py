"""What all tests share: no network, and what a machine lacks is said in the open."""

import importlib.util
import os

# set before anything imports huggingface_hub: a test that reaches for the network is a mistake
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# set before anything imports triton: without a GPU its kernels run in its interpreter
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

NO_GPU = "no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session", autouse=True)
def page_walk_without_extension() -> None:
    """Without the C++ extension nearly all caches, being strict, would raise: pages are walked."""
    # imported late, so that the hook which checks shapes comes first
    from kvfold.attention import dispatch
    from kvfold.kernels import cpu

    if cpu.native() is None:
        dispatch.KERNELS.pop("cpu")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if torch.cuda.is_available():
        from kvfold.calibration.artefact import commit

        device = torch.cuda.get_device_name()
        terminalreporter.write_line(f"{device}, torch {torch.__version__}, commit {commit()}")
    if importlib.util.find_spec("kvfold.kernels.cpu._native") is None:
        terminalreporter.write_line(
            "the C++ extension is not built: attention on CPUs ran in plain torch", yellow=True
        )
    # read from the reports, since under xdist the tests were collected in other processes
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("gpu" in report.keywords and NO_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"gpu tests: {count} skipped, {NO_GPU}", yellow=True)
