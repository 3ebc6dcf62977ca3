#!/usr/bin/env bash
# Train the model inside the package, maisi-phantom-tiny, from nothing: phantoms, five networks, mask database.
#
#     bash scripts/train_phantom_model.sh work
#
# The argument is a folder for what is made on the way, about 4 GB. On two CPU cores it takes some hours. Run it again to
# go on where it was interrupted; every stage resumes. The model is written to maisi_diffusers/pretrained.
set -euo pipefail

work=${1:?give a folder for what is made on the way}
scripts=$(cd "$(dirname "$0")" && pwd)
configs=$scripts/../configs/phantom_tiny
cores=$(nproc)
mkdir -p "$work"

phantoms() { # folder, first seed, number of cases, further options
    python "$scripts/make_phantoms.py" --output_dir "$work/$1" --first_seed "$2" --num_cases "$3" \
        --num_processes "$cores" "${@:4}"
}

train() { # script, output folder, options
    python "$scripts/$1.py" --output_dir "$work/$2" --seed 0 --mixed_precision bf16 --max_grad_norm 1 \
        --lr_scheduler cosine --lr_warmup_steps 50 --checkpointing_steps 500 --checkpoints_total_limit 1 \
        --resume_from_checkpoint latest "${@:3}"
}

# 1. CTs with their label maps, of all regions; label maps of chest and abdomen.
phantoms phantoms 0 480 --other_spacings 0.25 --tumors 0.4 --num_folds 24
phantoms mask-phantoms 10000 400 --other_spacings 0 --tumors 0.6 --num_folds 20 --body_region chest abdomen

# 2. Images: the VAE, which is the best linear one, but for its window: of all errors those in soft tissue are seen first,
# and -160 to 240 HU are a fifth of what the latents show; air has little room, and so is cleaned of noise. The UNet on
# its latents, for a while; and the two of UNet and ControlNet, which begins as the best linear one too. Our latents are
# so much alike from place to place that their structure shows through the usual noise: base_img_size_numel shifts the
# timesteps towards noise, by a ratio of 4.
# Tumors, bones and the organs that differ most between contrast phases have few voxels, and so count more. Sampling
# takes predictions for means, which l2 makes them: with l1 they are medians.
[ -f "$work/vae/config.json" ] || python "$scripts/start_vae.py" --vae_config_name_or_path "$configs/vae.json" \
    --data_list "$work/phantoms/dataset.json" --num_cases 33 --window -160 240 --air -880 --output_dir "$work/vae"
python "$scripts/encode_latents.py" --data_list "$work/phantoms/dataset.json" --vae "$work/vae" --posterior mean \
    --output_dir "$work/latents"
train train_unet unet --vae_model_name_or_path "$work/vae" --unet_config_name_or_path "$configs/unet.json" \
    --base_img_size_numel 512 --data_list "$work/latents/latents.json" --max_train_steps 400 --learning_rate 1e-3 \
    --loss_type l2 --lr_scheduler constant_with_warmup --lr_warmup_steps 100 --use_ema --ema_decay 0.99
[ -f "$work/linear-controlnet/config.json" ] || python "$scripts/start_controlnet.py" --first_channels 16 \
    --pretrained_model_name_or_path "$work/unet" --data_list "$work/latents/latents.json" \
    --output_dir "$work/linear-controlnet"
important="1 3 5 14 115 23 24 26 27 128 $(seq -s ' ' 33 56) $(seq -s ' ' 63 97) 120 122 127"
train train_controlnet images --pretrained_model_name_or_path "$work/unet" --train_unet --controlnet_dropout 0.3 \
    --controlnet_model_name_or_path "$work/linear-controlnet" --freeze_condition_embedding --modality_dropout 0.1 \
    --data_list "$work/latents/latents.json" --max_train_steps 5000 --learning_rate 1e-3 --lr_warmup_steps 100 \
    --use_ema --ema_decay 0.998 --loss_type l2 --weighted_loss 4 --weighted_loss_label $important
# Again. For the weights in the package, the first 750 steps had a schedule of 6500, and the first 1000 of masks-3 below
# one of 5000; what the latents do not depend on came after all training: the VAE's --air, and of the mask VAE that
# labels that stand for nothing are said less; and the linear ControlNet had a fit of fewer steps, which missed the values
# of tumors: they were fitted anew at the end, and the ControlNet alone was trained for 900 steps before that, and for 900
# and 600 after it.
train train_controlnet images-2 --pretrained_model_name_or_path "$work/images" --train_unet --controlnet_dropout 0.4 \
    --freeze_condition_embedding --modality_dropout 0.1 --data_list "$work/latents/latents.json" --seed 1 \
    --max_train_steps 5500 --learning_rate 1e-3 --use_ema --ema_decay 0.998 --loss_type l2 --weighted_loss 4 \
    --weighted_loss_label $important
# And mostly without label maps, by which the UNet learns where a body ends; so what is around it counts too.
train train_controlnet images-3 --pretrained_model_name_or_path "$work/images-2" --train_unet --controlnet_dropout 0.7 \
    --freeze_condition_embedding --modality_dropout 0.1 --data_list "$work/latents/latents.json" --seed 2 \
    --max_train_steps 4000 --learning_rate 7e-4 --use_ema --ema_decay 0.998 --loss_type l2 --weighted_loss 4 \
    --weighted_loss_label 0 $important
# At last the ControlNet alone, which has the UNet as it is now to steer.
train train_controlnet controlnet --pretrained_model_name_or_path "$work/images-3" --freeze_condition_embedding \
    --data_list "$work/latents/latents.json" --seed 3 --max_train_steps 1500 --learning_rate 5e-4 --use_ema \
    --ema_decay 0.99 --loss_type l2 --weighted_loss 4 --weighted_loss_label $(seq 28 32) $important

# 3. Label maps: the mask VAE, which begins as the best linear one, and the UNet on its latents.
[ -f "$work/linear-mask-vae/config.json" ] || python "$scripts/start_vae.py" --num_cases 16 \
    --vae_config_name_or_path "$configs/mask_vae.json" --data_list "$work/mask-phantoms/dataset.json" \
    --output_dir "$work/linear-mask-vae"
train train_vae mask-vae --vae_model_name_or_path "$work/linear-mask-vae" \
    --data_list "$work/mask-phantoms/dataset.json" --augmentation crop --patch_size 64 64 32 --patches_per_case 4 \
    --cached_cases 380 --max_train_steps 250 --learning_rate 5e-4 --lr_warmup_steps 20 --adam_beta2 0.95 \
    --kl_weight 1e-10
python "$scripts/encode_latents.py" --data_list "$work/mask-phantoms/dataset.json" --vae "$work/mask-vae" \
    --posterior mean --size 128 128 128 --output_dir "$work/mask-latents"
train train_unet masks --vae_model_name_or_path "$work/mask-vae" --unet_config_name_or_path "$configs/mask_unet.json" \
    --base_img_size_numel 512 --data_list "$work/mask-latents/latents.json" --loss_type l2 --max_train_steps 2000 \
    --learning_rate 1e-3 --lr_warmup_steps 100 --use_ema --ema_decay 0.997
# To learn how large tumors are there must be many of them: the same phantoms and some more, most with one.
phantoms tumor-phantoms 10000 480 --other_spacings 0 --tumors 0.85 --num_folds 24 --body_region chest abdomen
python "$scripts/encode_latents.py" --data_list "$work/tumor-phantoms/dataset.json" --vae "$work/mask-vae" \
    --posterior mean --size 128 128 128 --output_dir "$work/tumor-latents"
again() { # output folder, model, seed, steps
    train train_unet "$1" --pretrained_model_name_or_path "$work/$2" --data_list "$work/tumor-latents/latents.json" \
        --seed "$3" --max_train_steps "$4" --loss_type l2 --learning_rate 1e-3 --use_ema --ema_decay 0.998 \
        --weighted_loss 4 --weighted_loss_label 23 24 26 27 128
}
# The sizes of tumors are not learnt by this, and 9000 steps more, with a weight of 8, did not change it: of a tumor, some
# 50 of 32768 places of a latent, the noise of the first steps decides. The pipeline brings tumors to their size.
again masks-2 masks 1 6000
again masks-3 masks-2 2 3800

# 4. The mask database, from other phantoms; the model, which few steps of sampling suit best; the curves.
phantoms database 20000 32 --other_spacings 0 --tumors 0.7
python "$scripts/assemble_phantom_model.py" --image_model "$work/images-3" --controlnet "$work/controlnet" \
    --mask_model "$work/masks-3" --label_maps "$work/database" --anatomy_sizes "$work/tumor-phantoms/dataset.json" \
    --num_inference_steps 3 --image_only_num_inference_steps 20 --mask_num_inference_steps 6
python "$scripts/draw_training_curves.py" --every 50 --output "$scripts/../docs/training" \
    --runs "$work"/{unet,images,images-2,images-3,controlnet,mask-vae,masks,masks-2,masks-3}
