"""What every benchmark has: two options, and the machine, the threads and the versions in the JSON."""

import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import llvmlite.binding
import numba
import pytest
from pytest_benchmark.logger import PytestBenchmarkWarning

PACKAGES = ("numba", "llvmlite", "numpy", "torch", "trl", "liger-kernel", "jax", "numexpr", "pandas", "polars")


def pytest_addoption(parser):
    """How long, and how large."""
    parser.addoption("--seconds", type=float, default=8.0, help="about how long to measure a case (default: 8)")
    parser.addoption("--quick", action="store_true", help="small sizes only, to see that everything runs")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """What pytest-benchmark warns of, such as that there is nothing to compare with yet, is no error."""
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    warnings.simplefilter("default", PytestBenchmarkWarning)  # while it is configured itself, which is next


def _installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the report says of the machine."""
    machine_info["grpo_fast"] = {
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "threads": numba.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: _installed(package) for package in PACKAGES},
    }


@pytest.fixture(scope="session")
def quick(request):
    """Whether small sizes will do."""
    return request.config.getoption("quick")
