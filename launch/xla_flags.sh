# shellcheck shell=bash
# The flags of XLA, by chip: source this file, then `xla_flags CHIP`. What the user has set comes last, and so wins.
#
# XLA ends the process at a flag that it does not know, so every name here is checked by tests/launch against the
# installed jaxlib, and against libtpu where that is installed.
#
# Flags that recipes for TPUs used to need are missing on purpose: xla_tpu_enable_async_collective_fusion (with
# _fuse_all_gather and _multiple_steps), xla_tpu_overlap_compute_collective_tc, xla_enable_async_all_gather and
# xla_tpu_enable_latency_hiding_scheduler are on by default in libtpu 0.0.42 (for v5e a program compiled with each of
# them is the same as without).

# Sets XLA_FLAGS or LIBTPU_INIT_ARGS for v4, v5e, v5p, v6e, gpu (NVIDIA) or cpu; the second argument is the
# number of slices. Returns 2 for another chip.
xla_flags() {
  local chip=$1 slices=${2:-1} flags=()
  case $chip in
    v5p) ;;
    v4 | v5e | v6e)
      # By default the products of FSDP are cut into windows, which add up the whole result once each. Whole, the LoRA
      # stage of LLaVA-SP-7B moves 2.6 TiB a step through HBM instead of 4.2 as compiled for v5e-16, and 2.8 instead of
      # 4.4 for v6e-16, and needs 20 to 30 % less memory. Compiling it takes two to three times as long. Pretraining on
      # v6e-16 can take 0.55 s a step instead of 1.24, finetuning on v4-32 2.5 s instead of 3.4. On v5p-16 steps are
      # bound by their products without it.
      flags+=(--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000)
      ;;
    gpu)
      # Collectives start early and end late, with products in between; off by default. FSDP waits for every gather without.
      flags+=(--xla_gpu_enable_latency_hiding_scheduler=true)
      # The gather of the next layer's weights runs beside this layer, through the loop over layers.
      flags+=(--xla_gpu_enable_pipelined_all_gather=true)
      # The same for gradients; reduce-scatter is so by default.
      flags+=(--xla_gpu_enable_pipelined_all_reduce=true)
      # One layer of Vicuna-7B is 405 MB in bf16. The default of 30 MiB sends it in many small messages.
      flags+=(--xla_gpu_all_gather_combine_threshold_bytes=268435456)
      flags+=(--xla_gpu_reduce_scatter_combine_threshold_bytes=268435456)
      flags+=(--xla_gpu_all_reduce_combine_threshold_bytes=268435456)
      # Where one process dies, the others' collectives end with an error instead of waiting for it for ever.
      flags+=(--xla_gpu_nccl_terminate_on_error=true)
      ;;
    cpu) ;;
    *)
      echo "xla_flags: unknown chip '$chip'; known: v4 v5e v5p v6e gpu cpu" >&2
      return 2
      ;;
  esac
  if [[ $chip == v* && $slices -gt 1 ]]; then
    # Gradients of several slices cross the data centre's network, which is slow: all-reduces that belong to data
    # parallelism are taken out of the loop over layers and run beside it, also where their sizes differ.
    flags+=(--xla_tpu_enable_data_parallel_all_reduce_opt=true)
    flags+=(--xla_tpu_data_parallel_opt_different_sized_ops=true)
  fi
  case $chip in
    v*) export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}" ;;
    *) export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}" ;;
  esac
}
