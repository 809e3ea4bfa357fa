"""Before a machine is paid for: whether a job fits it, what bounds it, which mesh is best.

The very programs that a run starts (train step, prefill, decode) are compiled for devices that
are not there, from shapes alone; what the compiler says of memory and of what is sent is set
beside an analytic count of the arithmetic and the published figures of the hardware.
"""
