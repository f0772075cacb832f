"""Names, settings and weights of our networks as diffusers has them, and back.

model.py has the layers of diffusers' AutoencoderKL and UNet2DModel, so only names differ:
`vae_names` and `unet_names` pair them for both directions. Nothing here imports diffusers.
"""
import collections
import pathlib

import torch

import model
from lib.files import fail, first_line, read_json

# Parts of a ResBlock and of an Attention, if diffusers names them otherwise.
RENAMED = {"emb": "time_emb_proj", "skip": "conv_shortcut", "norm": "group_norm",
           "proj": "to_out.0"}
QKV = ("to_q", "to_k", "to_v")  # three layers there, one of ours
KINDS = {model.ResBlock: "resnets", model.Attention: "attentions",
         model.Downsample: "downsamplers", model.Upsample: "upsamplers"}
# Attention before diffusers 0.18; the files of stabilityai/sd-vae-ft-mse still have these names.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --- pairs of names -----------------------------------------------------------------------------


def numbered(name, layers):
    """[(our name, module)] of the layers of a list."""
    return [(f"{name}.{i}", layer) for i, layer in enumerate(layers)]


def block_names(layers, theirs):
    """[(our name, their name)] for layers [(our name, module)] in order.

    theirs: name of their blocks, with {} for the number. A block of theirs ends with an up- or
    downsampling and counts each kind of layer separately.
    """
    names, block, counts = [], 0, collections.Counter()
    for ours, layer in layers:
        kind = next(name for cls, name in KINDS.items() if isinstance(layer, cls))
        names.append((ours, f"{theirs.format(block)}.{kind}.{counts[kind]}"))
        counts[kind] += 1
        if kind.endswith("samplers"):
            block, counts = block + 1, collections.Counter()
    return names


def vae_names(vae):
    """[(our name, their name)] of all layers with weights of a model.AutoencoderKL."""
    encoder, decoder = numbered("encoder", vae.encoder), numbered("decoder", vae.decoder)
    names = [*block_names(encoder[1:-6], "encoder.down_blocks.{}"),
             *block_names(encoder[-6:-3], "encoder.mid_block"),
             *block_names(decoder[1:4], "decoder.mid_block"),
             *block_names(decoder[4:-3], "decoder.up_blocks.{}")]
    for part, layers in (("encoder", encoder), ("decoder", decoder)):  # both end: norm, SiLU, conv
        names += [(layers[0][0], f"{part}.conv_in"), (layers[-3][0], f"{part}.conv_norm_out"),
                  (layers[-1][0], f"{part}.conv_out")]
    optional = ("quant_conv", "post_quant_conv", "linear_encoder", "linear_decoder")
    return names + [(name, name) for name in optional if f"{name}.weight" in vae.state_dict()]


def unet_names(unet):
    """[(our name, their name)] of all layers with weights of a model.UNet, without the embedding of
    augmentations, which is zero for samples."""
    down, up = ([pair for i, block in enumerate(blocks) for pair in numbered(f"{name}.{i}", block)]
                for name, blocks in (("down", unet.down), ("up", unet.up)))
    return [("conv_in", "conv_in"), ("class_emb", "class_embedding"),
            ("time_mlp.0", "time_embedding.linear_1"), ("time_mlp.2", "time_embedding.linear_2"),
            *block_names(down, "down_blocks.{}"),
            *block_names(numbered("mid", unet.mid), "mid_block"),
            *block_names(up, "up_blocks.{}"),
            ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]


def key_pairs(module, names):
    """Yield (our key, [their keys]) of all weights; ours concatenates theirs along dimension 0."""
    for ours, theirs in names:
        for key in module.get_submodule(ours).state_dict():
            part, _, rest = key.rpartition(".")
            parts = QKV if part == "qkv" else [RENAMED.get(part, part)]
            yield f"{ours}.{key}", [".".join(filter(None, (theirs, p, rest))) for p in parts]


# --- to diffusers -------------------------------------------------------------------------------


def to_diffusers(module, names):
    """Weights {their key: tensor} of one of our networks."""
    own, state = module.state_dict(), {}
    for key, others in key_pairs(module, names):
        state.update(zip(others, own[key].chunk(len(others)), strict=True))
    return state


def common_config(size, base, mults, num_res_blocks, attn_res, block):
    """What the configurations of both networks say about levels; size: of the first level; block:
    name of a down block without attention."""
    down = [f"Attn{block}" if size >> level in attn_res else block for level in range(len(mults))]
    up = [name.replace("Down", "Up").replace("Encoder", "Decoder") for name in down[::-1]]
    return {"sample_size": size, "block_out_channels": [base * mult for mult in mults],
            "layers_per_block": num_res_blocks, "norm_num_groups": model.num_groups(base),
            "down_block_types": down, "up_block_types": up}


def unet_config(settings, latent_shape, num_classes):
    """Arguments of the UNet2DModel that equals our UNet with a dict of train_ldm.py's settings."""
    channels, size, _ = latent_shape
    base = settings["ldm_base_ch"]
    return {**common_config(size, base, settings["ldm_ch_mults"], settings["ldm_num_res_blocks"],
                            settings["ldm_attn_res"], "DownBlock2D"),
            "in_channels": channels, "out_channels": channels, "norm_eps": 1e-6,
            "attention_head_dim": model.head_dim(base),
            "attn_norm_num_groups": model.num_groups(base),
            "resnet_time_scale_shift": "scale_shift", "num_class_embeds": num_classes + 1}


def vae_config(settings, latent_scale_factor):
    """Arguments of the AutoencoderKL that equals ours with a dict of train_vae.py's settings; with
    patch_size or linear_path, of exported_pipeline.CXRAutoencoder."""
    patch = settings["patch_size"]
    config = {**common_config(settings["img_size"] // patch, settings["base_ch"],
                              settings["ch_mults"], settings["num_res_blocks"],
                              settings["attn_res"], "DownEncoderBlock2D"),
              "in_channels": patch**2, "out_channels": patch**2,
              "latent_channels": settings["z_channels"], "scaling_factor": latent_scale_factor,
              "use_quant_conv": settings["quant_conv"],
              "use_post_quant_conv": settings["quant_conv"]}
    if patch > 1 or settings["linear_path"]:
        return {"autoencoder": config, "patch_size": patch, "linear_path": settings["linear_path"],
                "scaling_factor": latent_scale_factor}
    return config


# --- an autoencoder of diffusers ----------------------------------------------------------------


def vae_folder(path):
    """Folder of the diffusers autoencoder at `path`, or in vae/ of a pipeline there, else None."""
    folders = pathlib.Path(path), pathlib.Path(path, "vae")
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def vae_settings(folder, img_size):
    """Settings of train_vae.py, {name: value}, for the shape of the autoencoder in a folder; exits
    with an error if model.AutoencoderKL cannot have it."""
    config = {"act_fn": "silu", "norm_num_groups": 32} | read_json(
        folder / "config.json", "diffusers config")
    widths = config.get("block_out_channels", [0])
    # What would be wrong without a word: all else shows in names and shapes of the weights.
    for name, value in {"_class_name": "AutoencoderKL", "act_fn": "silu",
                        "norm_num_groups": model.num_groups(widths[0])}.items():
        if config.get(name) != value:
            fail(f"{folder} has {name}={config.get(name)}, but ours needs {value}: give another")
    return {"z_channels": config["latent_channels"], "base_ch": widths[0],
            "ch_mults": tuple(width // widths[0] for width in widths),
            "num_res_blocks": config["layers_per_block"],
            "attn_res": tuple(img_size >> level for level, name
                              in enumerate(config["down_block_types"]) if "Attn" in name),
            "patch_size": 1, "linear_path": False,
            "quant_conv": config.get("use_quant_conv", True)}


def vae_weights(args, folder):
    """Weights {our key: tensor} from a diffusers folder for the autoencoder of train_vae.py's
    settings; exits with an error if some are missing. One of colour images becomes one of gray
    ones: its first convolution sees them in all channels, and its last one returns their mean."""
    path = folder / "diffusion_pytorch_model.safetensors"
    with torch.device("meta"):
        vae = model.build_vae(vars(args))
    try:
        from safetensors.torch import load_file
        state = {key: value.float() for key, value in load_file(path).items()}
        for key in [key for key in state if ".attentions." in key]:
            prefix, name, leaf = key.rsplit(".", 2)
            state[f"{prefix}.{OLD_NAMES.get(name, name)}.{leaf}"] = state.pop(key)
        state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].sum(1, keepdim=True)
        for key in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            state[key] = state[key].mean(0, keepdim=True)
        own = {key: torch.cat([state.pop(other) for other in others])
               for key, others in key_pairs(vae, vae_names(vae))}
    except Exception as e:  # whatever a damaged file raises
        fail(f"cannot read {path} ({first_line(e)}): pip install safetensors, download it again, "
             "or save the model with diffusers' save_pretrained")
    return own | state  # what is left over is refused where they are loaded
