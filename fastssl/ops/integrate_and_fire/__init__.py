"""Continuous integrate-and-fire over packed sequences: frames become fewer frames, by learned weights."""

from fastssl.ops.integrate_and_fire.op import integrate_and_fire as integrate_and_fire
