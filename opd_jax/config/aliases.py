"""What other trainers call our config fields: for the error about a name that is not one.

Names of TRL, verl, OpenRLHF, NeMo-RL, ms-swift, tinker-cookbook and transformers (2026). Nothing is ever
set by such a name: the same word means different things to different programs (`beta`, `batch_size`).
"""

WORKDIR = "--workdir"  # a flag and no field
OPTIMIZER = "AdamW"  # a choice that is not there

_NAMES = {
    "steps": "max_steps num_steps train_steps training_steps total_steps total_training_steps iterations",
    "seed": "random_seed",
    "student.path": "model student student_model model_name model_name_or_path model_path model_id "
    "base_model student_model_name_or_path pretrained model.name",
    "teacher.path": "teacher teacher_model teacher_model_name_or_path teacher_model_path teacher_name",
    "reference.path": "reference ref_model ref_model_path reference_model",
    "student.dtype": "bf16 fp16 torch_dtype precision compute_dtype mixed_precision",
    "teacher.decay": "ema ema_decay",
    "lora.rank": "lora_r lora_dim lora_rank peft_rank use_peft use_lora",
    "lora.alpha": "lora_alpha",
    "lora.power": "use_rslora rslora",
    "lora.targets": "lora_target_modules target_modules lora_targets",
    "lora.path": "adapter_path adapter_name_or_path lora_path lora_adapter_path",
    "data.train": "data dataset dataset_name data_path train_data train_file train_files train_dataset "
    "dataset_path train_path",
    "data.epochs": "epochs num_epochs num_train_epochs total_epochs max_epochs",
    "eval.data": "eval_dataset val_data val_files test_data",
    "rollout.prompts_per_step": "batch_size train_batch_size rollout_batch_size global_batch_size "
    "prompts_per_batch groups_per_batch num_prompts_per_step",
    "rollout.prompts_per_step optim.microbatch_tokens": "per_device_train_batch_size "
    "gradient_accumulation_steps gradient_accumulation grad_accum_steps micro_batch_size",
    "optim.microbatch_tokens": "ppo_max_token_len_per_gpu ppo_micro_batch_size_per_gpu microbatch_size",
    "optim.updates_per_rollout": "mini_batch_size ppo_mini_batch_size num_minibatches num_substeps "
    "num_iterations ppo_epochs steps_per_generation",
    "rollout.samples_per_prompt": "num_generations n group_size n_samples n_samples_per_prompt rollout_n "
    "num_return_sequences num_generations_per_prompt",
    "rollout.max_prompt_tokens": "max_prompt_length prompt_length prompt_max_len",
    "rollout.max_response_tokens": "max_new_tokens max_completion_length max_response_length max_tokens "
    "response_length generate_max_len max_gen_len max_output_tokens",
    "rollout.max_prompt_tokens rollout.max_response_tokens": "max_length max_seq_len max_seq_length "
    "max_model_len seq_len max_total_sequence_length",
    "rollout.temperature": "temp sampling_temperature",
    "rollout.slots": "max_num_seqs",
    "loss.beta_kl": "kl_coef kl_beta kl_weight kl_loss_coef init_kl_coef kl_coeff",
    "loss.beta_kl loss.teacher_coef": "kl_penalty_coef",
    "loss.beta_kl loss.jsd_beta": "beta",
    "loss.kl_estimator": "kl_loss_type kl_penalty kl_estimator_type",
    "loss.clip_low loss.clip_high": "clip_ratio cliprange epsilon clip_eps clip_range eps_clip",
    "loss.clip_low": "clip_ratio_low epsilon_low",
    "loss.clip_high": "clip_ratio_high epsilon_high",
    "loss.dual_clip": "clip_ratio_c",
    "loss.lambda_gold": "sft_coef sft_weight sft_loss_coef lambda_sft lambda_golden",
    "loss.aggregation": "loss_agg_mode loss_type",
    "loss.discount": "gamma discount_factor kl_discount_factor",
    "loss.importance_cap": "tis_imp_ratio_cap importance_sampling_cap rollout_is_threshold",
    "loss.group_normalise": "scale_rewards norm_adv_by_std_in_grpo",
    "loss.divergence_weight": "kd_weight kd_loss_coef distill_weight distillation_loss_coef",
    "optim.learning_rate": "lr actor_lr actor_learning_rate max_lr peak_lr",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
    "optim.warmup_steps": "num_warmup_steps lr_warmup_steps warmup",
    "optim.warmup_fraction": "warmup_ratio lr_warmup_steps_ratio",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.weight_decay": "wd",
    "optim.grad_clip": "max_grad_norm clip_grad clip_grad_norm gradient_clipping grad_norm",
    "optim.remat": "gradient_checkpointing enable_gradient_checkpointing activation_checkpointing",
    OPTIMIZER: "optimizer optimiser optim.name adam_epsilon",
    "mesh.data": "dp",
    "mesh.fsdp": "fsdp fsdp_size zero_stage",
    "mesh.tensor": "tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size "
    "vllm_tensor_parallel_size",
    "checkpoint.every": "save_steps save_freq save_every save_interval",
    "checkpoint.keep": "save_total_limit max_to_keep max_ckpt_to_keep",
    "eval.every": "eval_steps eval_interval eval_freq eval_every test_freq",
    "log.every": "logging_steps log_interval log_freq log_every",
    "log.wandb": "wandb wandb_project project_name report_to use_wandb",
    WORKDIR: "workdir output_dir out_dir save_dir log_dir log_path save_path default_local_dir "
    "checkpoint_dir resume_from_checkpoint run_name experiment_name",
}
FIELDS = {alias: ours.split() for ours, aliases in _NAMES.items() for alias in aliases.split()}
