"""What every benchmark has: two options, and the machine, the threads and the versions in the JSON."""

import platform
from importlib.metadata import PackageNotFoundError, version

import llvmlite.binding
import loss_peers
import numba
import objective_peers
import pytest
from timing import present

PACKAGES = ("numba", "llvmlite", "numpy", "torch", "trl", "liger-kernel", "jax", "numexpr")


def pytest_addoption(parser):
    """How long, and how large."""
    parser.addoption("--seconds", type=float, default=8.0, help="about how long to measure a case (default: 8)")
    parser.addoption("--quick", action="store_true", help="small sizes only, to see that everything runs")


def _installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the report says of the machine."""
    missing = present(objective_peers.PEERS)[1] | present(loss_peers.PEERS)[1]
    machine_info["grpo_fast"] = {
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "threads": numba.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: _installed(package) for package in PACKAGES},
        "missing": missing,
    }


@pytest.fixture(scope="session")
def quick(request):
    """Whether small sizes will do."""
    return request.config.getoption("quick")
