"""A GPU's clocks, power and temperature, read and never set: a row says under which it was measured."""

import subprocess

import torch

QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")
NAMES = ("sm_mhz", "memory_mhz", "watts", "celsius", "throttled")


def read(device: torch.device) -> dict:
    """By name, megahertz, watts, degrees and the bits that say why clocks are lowered; or, under "unreadable", why not.

    From NVIDIA's management library where `pynvml` can be imported, else from `nvidia-smi`. Nothing for a CPU.
    """
    if device.type != "cuda":
        return {}
    index = device.index or 0
    try:
        return dict(zip(NAMES, _from_library(index)))
    except Exception as error:  # Its errors are of its own kinds, and it may be absent.
        missing = f"pynvml: {type(error).__name__}: {error}"
    try:
        return dict(zip(NAMES, _from_command(index)))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return {"unreadable": f"{missing}; nvidia-smi: {type(error).__name__}: {error}"}


def shown(reading: dict) -> str:
    """On one line."""
    if "unreadable" in reading:
        return f"not readable ({reading['unreadable']})"
    units = {"sm_mhz": "MHz SM", "memory_mhz": "MHz memory", "watts": "W", "celsius": "°C"}
    found = [f"{reading[name]:.0f} {unit}" for name, unit in units.items() if name in reading]
    return ", ".join(found + ([f"clocks lowered for 0x{reading['throttled']:x}"] if reading.get("throttled") else []))


def _from_library(index: int) -> tuple:
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    return (
        pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
    )


def _from_command(index: int) -> tuple:
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    *numbers, throttled = (cell.strip() for cell in printed.split(","))
    return (*map(float, numbers), int(throttled, 16))
