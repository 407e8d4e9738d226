# Written by tools/api_stubs.py.
from typing import Any, Literal

from aimv2.data.text.models import load_model as load_model
from aimv2.data.text.models import save_pretrained as save_pretrained


def pretrain(config: str | None = None, run: str | None = None, options: dict[str, Any] | None = None, dry_run: bool = False, print_config: bool = False) -> dict[str, Any]:
    """Pre-train an AIMV2: recipe, run folder and dotted options in, a trained run out."""

def vlm_train(config: str | None = None, run: str | None = None, options: dict[str, Any] | None = None, dry_run: bool = False, print_config: bool = False) -> dict[str, Any]:
    """Tune a vision-language model of `aimv2 vlm build` on conversations about images."""

def detect_train(config: str | None = None, run: str | None = None, options: dict[str, Any] | None = None, dry_run: bool = False, print_config: bool = False) -> dict[str, Any]:
    """Train a detector of classes, phrases or masks on the feature pyramid of an encoder."""

def run(chain: str, out: str | None = None, data: str | None = None, only: str | None = None, redo: bool = False, status: bool = False) -> dict[str, Any]:
    """Run a chain of stages: what is not done yet, in order; an interrupted stage resumes, and one report is written."""

def plan(config: str | None = None, options: dict[str, Any] | None = None, gpus: int = 1, gpu: str = 'h100', nodes: int = 1, price: float | None = None, mfu: float = 0.4, tokens: float = 32.0, decode_rate: float | None = None, write_speed: float = 1.0, check: str | None = None) -> dict[str, Any]:
    """Plan a pre-training run before it is paid for: memory, layout, time, cost, loader."""

def recipes(names: str | list[str] | None = None) -> dict[str, Any]:
    """List the recipes of `pretrain --config` and the chains of `run`, or print files of theirs, for `> mine.yaml`."""

def report(runs: list[str], out: str | None = None, images: int = 6, device: str | None = None, watch: float | None = None) -> dict[str, Any]:
    """Write a page of what a run has learned; for several runs their curves, figures and differences."""

def data_import(source: str, out: str, captions: str | None = None, image_column: str | None = None, caption_column: list[str] | str | None = None, template: str = 'a photo of a {}.', split: str | None = None, val_fraction: float = 0.0, val_list: str | None = None, max_side: int | None = None, shard_size: int = 1000, workers: int | None = None, class_folders: bool = False, image_root: str | None = None, no_captions: bool = False, conversations: bool = False, boxes: bool = False) -> dict[str, Any]:
    """Convert captioned images, in whatever form they are, to WebDataset shards."""

def data_check(source: str, tokenizer: str | None = None, min_side: int = 16) -> dict[str, Any]:
    """Check shards before training: counts, sizes, caption lengths, duplicates, unreadable and tiny images."""

def data_browse(config: str | None = None, options: dict[str, Any] | None = None, out: str = 'browse.html', count: int = 32, open: bool = False) -> dict[str, Any]:
    """Write a page of the first samples of a run, as its model will see them: crop, prefix, caption tokens, mixture."""

def data_shapes(out: str, count: int = 20000, size: int = 32, largest: int | None = None, seed: int = 0, objects: int | None = None, object_size: str | None = None, distractors: float = 0.0, questions: int = 0, hold_out: float = 0.0, hold_out_seed: int = 0, only_held_out: bool = False) -> dict[str, Any]:
    """Write the built-in captioned scenes as shards: shapes with colour, size and place, and unseen validation scenes."""

def data_teach(teacher: str, data: str, out: str, views: int = 2, crop_scale: float = 0.4, crop_ratio: tuple[float, float] = (0.75, 1.3333), flip: float = 0.5, seed: int = 0, batch_size: int = 64, device: str | None = None, precision: Literal['fp32', 'bf16'] = 'fp32', image_mean: str | None = None, image_std: str | None = None) -> dict[str, Any]:
    """Write a teacher's patch features of random views of each image into new shards, for objective.teacher=stored."""

def tokenizer_train(captions: str, out: str, vocab_size: int = 4096) -> dict[str, Any]:
    """Train a byte-level BPE on captions."""

def knn(model: str, data: str | None = None, dataset: str | None = None, k: int | str | list[int] = '1,5,10,20,50,100,200', weights: Literal['uniform', 'distance'] = 'uniform', temperature: float = 0.07, backend: Literal['auto', 'torch', 'faiss'] = 'auto', layers: str = 'last', pool: Literal['mean', 'attention'] = 'mean', baselines: str | list[str] | None = None, train_limit: int = 0, test_limit: int = 0, image_size: int | str | None = None, batch_size: int = 64, seed: int = 0, device: str | None = None, precision: Literal['fp32', 'bf16'] = 'fp32', cache: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None, image_root: str | None = None, test_fraction: float | None = None) -> dict[str, Any]:
    """Evaluate a frozen encoder by its nearest neighbours: no training, cosine similarity, a sweep over k."""

def linear(model: str, data: str | None = None, dataset: str | None = None, solver: Literal['lbfgs', 'sgd'] = 'lbfgs', layers: str = 'last', baselines: str | list[str] | None = None, train_limit: int = 0, test_limit: int = 0, image_size: int | str | None = None, batch_size: int = 64, seed: int = 0, device: str | None = None, precision: Literal['fp32', 'bf16'] = 'fp32', cache: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None, image_root: str | None = None, test_fraction: float | None = None) -> dict[str, Any]:
    """Evaluate a frozen encoder by a linear classifier on the mean of its patch features, following CLIP's protocol."""

def probe(model: str, data: str | None = None, dataset: str | None = None, protocol: Literal['attentive', 'efficient'] = 'attentive', features: Literal['cached', 'augmented'] = 'cached', layers: str = 'last', epochs: int | None = None, warmup: float = 0.0, batch_size: int | None = None, rates: str | None = None, decays: str | None = None, heads: int | None = None, flip: bool = False, select: Literal['auto', 'val', 'heldout', 'test'] = 'auto', seeds: int | str | list[int] = '0', baselines: str | list[str] | None = None, train_limit: int = 0, test_limit: int = 0, image_size: int | str | None = None, trunk_batch: int = 64, workers: int = 2, device: str | None = None, precision: Literal['fp32', 'bf16'] = 'fp32', cache: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None, image_root: str | None = None, test_fraction: float | None = None, refit: bool | None = None, start: Literal['random', 'linear'] | None = None) -> dict[str, Any]:
    """Evaluate a frozen encoder by probes on its patch features: the whole grid of learning rates and weight decays at once
    (AIMV2, Table A2)."""

def fewshot(model: str, data: str | None = None, dataset: str | None = None, shots: int | str | list[int] = '1,5,10', seeds: int = 5, layers: str = 'last', baselines: str | list[str] | None = None, test_limit: int = 0, image_size: int | str | None = None, batch_size: int = 64, seed: int = 0, device: str | None = None, precision: Literal['fp32', 'bf16'] = 'fp32', cache: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None, image_root: str | None = None, test_fraction: float | None = None) -> dict[str, Any]:
    """Evaluate a frozen encoder by a classifier fitted on a few images per class, over several draws."""

def zeroshot(model: str, data: str | None = None, dataset: str | None = None, templates: str = 'default', classes: str | None = None, by: Literal['auto', 'contrastive', 'likelihood'] = 'auto', normalize: Literal['prior', 'sum', 'mean'] = 'prior', limit: int = 0, seed: int = 0, baselines: str | list[str] | None = None, batch_size: int = 64, device: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None, image_root: str | None = None) -> dict[str, Any]:
    """Classify images by the texts of their classes, without training: top-1, top-5, by class (AIMV2, Table 5)."""

def retrieve(model: str, data: str | None = None, captions: str | None = None, candidates: int | None = None, k: int | str | list[int] = '1,5,10', by: Literal['auto', 'contrastive', 'likelihood'] = 'auto', normalize: Literal['prior', 'sum', 'mean'] = 'prior', seed: int = 0, baselines: str | list[str] | None = None, batch_size: int = 64, device: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None) -> dict[str, Any]:
    """Find the image of a caption and a caption of an image: recall at k, both ways, with chance."""

def segment(model: str, data: str | None = None, classes: int | None = None, ignore: int = 255, reduce_zero: bool = False, val_list: str | None = None, val_fraction: float = 0.0, layers: str = 'last', rates: str | None = None, weight_decay: float = 0.0001, epochs: int = 20, batch_size: int = 16, seeds: int | str | list[int] = '0', baselines: str | list[str] | None = None, image_size: int | str | None = None, trunk_batch: int = 64, device: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None, values: str | None = None, dataset: str | None = None, head: Literal['linear', 'dpt'] = 'linear') -> dict[str, Any]:
    """Segment by a probe on frozen patch features: mIoU, 0 to 1."""

def depth(model: str, data: str | None = None, depth_scale: float | None = None, val_list: str | None = None, val_fraction: float = 0.0, layers: str = 'last', rates: str | None = None, weight_decay: float = 0.0001, epochs: int = 20, batch_size: int = 16, seeds: int | str | list[int] = '0', baselines: str | list[str] | None = None, image_size: int | str | None = None, trunk_batch: int = 64, device: str | None = None, out: str | None = None, image_mean: str | None = None, image_std: str | None = None, invalid: str | None = None, dataset: str | None = None, head: Literal['linear', 'dpt'] = 'linear') -> dict[str, Any]:
    """Estimate depth by a probe on frozen patch features: RMSE in metres, abs-rel, delta1 (ratio below 1.25)."""

def vlm_score(vlm: str, data: str | None = None, split: Literal['train', 'val', 'test'] = 'val', controls: bool = True, limit: int = 0, max_tokens: int | None = None, batch_size: int = 64, seed: int = 0, device: str | None = None, out: str | None = None, tasks: str | None = None, shots: str = '0', include: str | None = None, earlier_turns: bool = True) -> dict[str, Any]:
    """Score the answers of a vision-language model: questions of shards by exact match, or benchmarks of lmms-eval."""

def detect_score(predictions: str | None = None, data: str | None = None, split: Literal['train', 'val', 'test'] = 'val', dataset: Literal['coco2017', 'lvis', 'refcoco', 'refcoco+', 'refcocog'] | None = None, name: str | None = None, out: str | None = None, model: str | list[str] | None = None, batch_size: int = 16, device: str | None = None) -> dict[str, Any]:
    """Score detections: COCO's average precision of boxes and masks, LVIS's on federated annotations, P@1 of phrases."""

def compare(results: list[str], dataset: str | None = None, format: Literal['text', 'markdown', 'json'] = 'text', plot: str | None = None) -> dict[str, Any]:
    """Compare results with one another and with the paper's figures on the same data sets."""

def caption(model: str, images: list[str], max_tokens: int | None = None, temperature: float = 0.0, top_p: float = 1.0, beams: int = 1, seed: int = 0, batch_size: int = 64, data: str | None = None, score: bool = False, limit: int = 0, baselines: str | list[str] | None = None, out: str | None = None, device: str | None = None, repetition_penalty: float = 1.0, ask: str | None = None) -> dict[str, Any]:
    """Write captions of images: greedy, sampled, or by beam search; or score such captions against references; or answer a question."""

def detect_photo(images: list[str], words: str | None = None, model: str | None = None, threshold: float | None = None, out: str | None = None, device: str | None = None) -> dict[str, Any]:
    """Find things in pictures with a detector of aimv2 detect train: print their boxes and draw them."""

def embed(model: str, images: str, out: str, pool: Literal['mean', 'attention', 'none'] = 'mean', layers: str = 'last', format: Literal['npy', 'parquet'] = 'npy', shard_size: int | None = None, batch_size: int = 16, device: str | None = None, precision: Literal['fp32', 'bf16'] = 'fp32', image_root: str | None = None) -> dict[str, Any]:
    """Write features of many images, in files of equal parts; under torchrun several processes share the work."""

def explore(model: str, images: str | None = None, other: str | None = None, limit: int = 200, host: str = '127.0.0.1', port: int = 8421, open: bool = False, upload_mb: float = 10.0, device: str | None = None, image_mean: str | None = None, image_std: str | None = None, image_root: str | None = None) -> dict[str, Any]:
    """Explore a model in the browser: features, similar patches, attention, captions, next patches, search by text, questions."""

def models() -> dict[str, Any]:
    """List every model: parameters, GFLOPs per image, input size; licence and revision of released ones."""

def convert(source: str, out: str, to: Literal['released', 'transformers', 'timm', 'onnx', 'openvino', 'safetensors', 'backbone'] = 'transformers', revision: str | None = None, precision: Literal['fp32', 'bf16', 'int8'] | None = None, images: str | None = None, samples: int = 300, licence: str | None = None) -> dict[str, Any]:
    """Write a model in the layout of the tool that will open it."""

def push(model: str, repository: str, to: Literal['released', 'transformers', 'timm', 'onnx', 'openvino', 'safetensors', 'backbone'] = 'transformers', private: bool = False, licence: str | None = None, message: str = 'Upload an AIMV2 encoder') -> dict[str, Any]:
    """Upload a model to the hub, with its card."""

def vlm_build(encoder: str, llm: str, out: str, features: Literal['post-norm', 'pre-norm'] | None = None, tiles: int = 1, chat_template: str | None = None, image_size: int | None = None, dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto', seed: int = 0) -> dict[str, Any]:
    """Put an encoder under a causal language model, as one folder that transformers opens."""

def doctor(quick: bool = False, runs: list[str] | None = None) -> dict[str, Any]:
    """Check this machine: versions, devices, kernels, hub, disk, process groups, and a tiny run with timing."""
