#!/usr/bin/env bash
# The same command on every host of a Cloud TPU slice; the TPU's metadata name the coordinator.
#
#   TPU=my-v5e-64 ZONE=us-east5-a scripts/tpu_pod.sh --config configs/diffrate_vitb.py \
#     --workdir /mnt/shared/diffrate_vitb --config.data.dir=/data/tfds
#
# Each host needs the checkout in ~/vitcomp_jax and `pip install -e ".[tpu]"`. The workdir must be
# on a file system that all hosts share, such as a mounted bucket or Filestore.
set -euo pipefail
: "${TPU:?expected the name of the TPU}" "${ZONE:?expected its zone}"
printf -v command ' %q' python -m vitcomp_jax.main --distributed "$@"
exec ${GCLOUD:-gcloud} compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
  --command "cd ~/vitcomp_jax && exec$command"
