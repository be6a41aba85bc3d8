"""XLA's programs for a GPU, without one: compiled for a named device, and checked. Neither is a run
on hardware."""

# What XLA's compiler asks of a device (GpuTargetConfigProto). Figures of NVIDIA's data sheets and
# of the CUDA programming guide's table of compute capabilities.
COMMON = """
threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
registers_per_core_limit: 65536 registers_per_block_limit: 65536
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
"""
TARGETS = {
    # H100 SXM, 80 GB
    "h100": """
        core_count: 132 fpus_per_core: 128 threads_per_core_limit: 2048 clock_rate_ghz: 1.98
        shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
        l2_cache_size: 52428800 memory_bandwidth: 3352000000000 device_memory_size: 85899345920
        cuda_compute_capability { major: 9 minor: 0 }""",
    # A100 SXM, 80 GB
    "a100": """
        core_count: 108 fpus_per_core: 64 threads_per_core_limit: 2048 clock_rate_ghz: 1.41
        shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
        l2_cache_size: 41943040 memory_bandwidth: 2039000000000 device_memory_size: 85899345920
        cuda_compute_capability { major: 8 minor: 0 }""",
    "l4": """
        core_count: 58 fpus_per_core: 128 threads_per_core_limit: 1536 clock_rate_ghz: 2.04
        shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376
        l2_cache_size: 50331648 memory_bandwidth: 300000000000 device_memory_size: 25769803776
        cuda_compute_capability { major: 8 minor: 9 }""",
}
