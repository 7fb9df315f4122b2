"""The models of the zoo: one small variant of each family of timm, and small configurations of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TIMM_NAMES = """
bat_resnext26ts botnet26t_256 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny convmixer_768_32
convnext_zepto_rms convnextv2_atto cpubone_b0_bfrobust cpubone_nano cpubone_s0 cpubone_t0 crossvit_tiny_240
cs3darknet_focus_s csatv2 cspnext_tiny darknet17 davit_tiny deit_tiny_patch16_224 densenet121 densenetblur121d
dla46x_c dpn48b eca_botnext26ts_256 eca_halonext26ts eca_resnext26ts ecaresnext26t_32x4d edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0
efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b
focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnext26ts gcvit_xxtiny gernet_s ghostnet_050 ghostnetv3_050 gmixer_12_224
gmlp_ti16_224 halonet26t halonet_h1 haloregnetz_b hardcorenas_b hgnet_tiny hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
iformer_t inception_next_atto inception_v3 lambda_resnet26t lcnet_035 lcnetv2_small legacy_seresnet18 legacy_xception
levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256 mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv2_035
mobilenetv3_small_050 mobileone_s0 mobileone_s1 mobileone_s2 mobileone_s3 mobileone_s4 mobilevit_xxs mobilevitv2_050
mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 pit_ti_224 poolformer_s12 poolformerv2_s12 pvt_v2_b0
rdnet_tiny regnetx_002 regnety_002 regnetz_005 regnetz_b16 regnetz_c16 repghostnet_050 repvgg_a0 repvgg_a1 repvit_m1
res2next50 resnest14d resnet10t resnetblur18 resnetv2_18 resnext26ts rexnet_100 rexnetr_100 sam2_hiera_tiny
samvit_base_patch16_224 sebotnet33ts_256 sehalonet33ts selecsls42 semnasnet_050 sequencer2d_s seresnet18 seresnext26ts
shvit_s1 skresnet18 spnasnet_100 starnet_s050 swiftformer_l1 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout
test_nfnet test_resnet test_vit test_vit_relpos tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s
tf_mobilenetv3_small_075 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny
vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p8_224
"""
TIMM = TIMM_NAMES.split()
TEXT_NAMES = """
bert roberta albert electra distilbert deberta deberta-v2 mpnet xlm xlnet xlm-roberta camembert flaubert longformer
big_bird reformer nystromformer yoso mra rembert roformer squeezebert mobilebert layoutlm ibert ernie esm
canine convbert fnet luke megatron-bert modernbert data2vec-text xmod roc_bert bert-generation roberta-prelayernorm
lilt markuplm bros splinter xlm-roberta-xl eurobert nomic_bert gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral
mixtral gemma gemma2 gemma3_text phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe mamba mamba2 rwkv falcon codegen ctrl
openai-gpt stablelm starcoder2 olmo olmo2 mpt persimmon cohere granite gpt_bigcode biogpt xglm recurrent_gemma jamba
nemotron glm smollm3 helium t5 mt5 umt5 bart mbart pegasus marian blenderbot m2m_100 longt5 led prophetnet
switch_transformers plbart bigbird_pegasus tapas visual_bert clip_text_model imagegpt
"""
IMAGE_NAMES = """
vit deit beit swin swinv2 convnext convnextv2 resnet regnet mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2
efficientnet dinov2 dinov2_with_registers dinov3_vit dinov3_convnext vit_mae vit_msn data2vec-vision segformer
poolformer levit pvt pvt_v2 focalnet hiera swiftformer bit glpn ijepa siglip_vision_model clip_vision_model
vivit timesformer videomae textnet hgnet_v2 donut-swin maskformer-swin yolos dpt vitdet sam_vision_model
aimv2_vision_model mlcd_vision_model timm_wrapper vjepa2 pixio mgp-str
"""
# Values of configurations, where they have them.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 64,
    "patch_size": 16,
    "kv_channels": 8,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rotary_dim": 4,
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
}
FOUR: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
PYRAMID: dict[str, Any] = {**FOUR, "num_attention_heads": [1, 2, 2, 4]}
SWIN: dict[str, Any] = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
TWO: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
# Models of texts, and of images; what their configurations need beside `SMALL`.
TEXTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in TEXT_NAMES.split()},
    "ctrl": {"dff": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "lilt": {"max_2d_position_embeddings": 128, "hidden_size": 48},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 8},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 16},
    "mobilebert": {"true_hidden_size": 16, "intra_bottleneck_size": 16},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"moe_intermediate_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlnet": {"d_head": 8, "d_inner": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
IMAGES: dict[str, dict[str, Any]] = {
    **{name: {} for name in IMAGE_NAMES.split()},
    "bit": {**TWO, "num_groups": 4},
    "convnext": {"patch_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"patch_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "dinov3_convnext": FOUR,
    "donut-swin": SWIN,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "focalnet": {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "glpn": PYRAMID,
    "hiera": {
        "embed_dim": 16,
        "image_size": [64, 64],
        "patch_size": [7, 7],
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 2],
        "query_stride": [2, 2],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
    },
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "key_dim": [8, 8, 8],
        "depths": [1, 1, 1],
        "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 3, 2, 2, 2]],
    },
    "maskformer-swin": SWIN,
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"patch_size": 2, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
    "mobilevitv2": {"patch_size": 2, "width_multiplier": 0.25},
    "poolformer": FOUR,
    "pvt": {**PYRAMID, "patch_sizes": [4, 2, 2, 2]},
    "pvt_v2": PYRAMID,
    "regnet": {**TWO, "groups_width": 8},
    "resnet": TWO,
    "segformer": {**PYRAMID, "decoder_hidden_size": 16},
    "swiftformer": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": SWIN,
    "swinv2": SWIN,
    "timesformer": {"num_frames": 2},
    "videomae": {"num_frames": 2},
    "vivit": {"num_frames": 2, "tubelet_size": [2, 16, 16]},
    "yolos": {"image_size": [64, 64], "num_detection_tokens": 4},
}
TRANSFORMERS = {**TEXTS, **IMAGES}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
Made = tuple[Callable[[Any], Tensor], str, Path | None]


def network_of(name: str, folder: Path) -> Made:
    """What a model gives for raw inputs, by its own package alone; its address for `load_base`; and its weights."""
    kind, _, model = name.partition(":")
    return _timm(model, folder) if kind == "timm" else _transformers(model, folder)


def _timm(name: str, folder: Path) -> Made:
    """The weights hold the classifier, as published ones do."""
    import timm

    net: Any = timm.create_model(name, pretrained=False)
    stir(net)
    save_file({key: value.contiguous().clone() for key, value in net.state_dict().items()}, folder / "net.safetensors")
    config = net.pretrained_cfg
    net.reset_classifier(0)
    norm = config["mean"], config["std"]
    return lambda x: net(_normalised(x, *norm)), f"timm:{name}", folder / "net.safetensors"


def _transformers(name: str, folder: Path) -> Made:
    from transformers import CONFIG_MAPPING, AutoModel

    kind = CONFIG_MAPPING[name]
    known = kind().to_dict()
    values = {key: value for key, value in SMALL.items() if not isinstance(known.get(key, ()), (list, tuple))}
    net: Any = AutoModel.from_config(kind(**{**values, **TRANSFORMERS[name]}))
    stir(net)
    net.save_pretrained(folder / "net")
    if name in IMAGES:
        told = {"image_mean": MEAN, "image_std": STD, "do_normalize": True}
        (folder / "net/preprocessor_config.json").write_text(json.dumps(told))
    if net.config.is_encoder_decoder:
        net = net.get_encoder()

    def run(x: Any) -> Tensor:
        given = x if isinstance(x, dict) else {net.main_input_name: x}
        if x_is_image := name in IMAGES and not isinstance(x, dict) and x.dtype == torch.uint8:
            given = {"pixel_values": _normalised(x, MEAN, STD)}
        assert x_is_image or name not in IMAGES or not isinstance(x, dict)
        return net(**given).last_hidden_state  # type: ignore[no-any-return]

    return run, f"hf:{folder / 'net'}", None


def _normalised(x: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    return (x.float() / 255 - mean) / std


def stir(net: nn.Module) -> None:
    """Random weights where a network begins with zeros or ones; statistics of batch norms that are none of its own."""
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if not value.is_floating_point() or value.ndim > 1:
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or isinstance(value, nn.Parameter):
                value.add_(0.05 * torch.randn_like(value))
    net.eval()
