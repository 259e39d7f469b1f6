"""What a training will cost, told before it is paid: one step on fake tensors in a fake process group."""

from fastssl.planning.devices import DEVICES, Device, find_device
from fastssl.planning.plan import Plan, make_plan
from fastssl.planning.trace import Trace, trace_step

__all__ = ["DEVICES", "Device", "Plan", "Trace", "find_device", "make_plan", "trace_step"]
