# Written by tools/api_stubs.py.
from typing import Any, Literal

from aimv2.data.text.models import load_model as load_model
from aimv2.data.text.models import save_pretrained as save_pretrained


def pretrain(
    config: str | None = None,
    run: str | None = None,
    options: dict[str, Any] | None = None,
    dry_run: bool = False,
    print_config: bool = False,
) -> dict[str, Any]:
    """Pre-train an AIMV2: recipe, run folder and dotted options in, a trained run out.

    Args:
        config: YAML recipe; without one and without data: the demo on captioned scenes
        run: run folder
        options: values by dotted key, which override the recipe's (``{"train.steps": 100, "resume": True}``)
        dry_run: build everything, run one step, say what a run takes
        print_config: show the effective values and where they came from

    Returns:
        the run's summary (also in ``summary.json``), or what ``dry_run`` or ``print_config`` found.

    Raises:
        UsageError: a mistake of input, in one line.
        Interrupted: a signal came; the run has been saved.
    """

def run(
    chain: str,
    out: str | None = None,
    data: str | None = None,
    only: str | None = None,
    redo: bool = False,
    status: bool = False,
) -> dict[str, Any]:
    """Run a chain of stages: what is not done yet, in order; an interrupted stage resumes, and one report is written.

    Args:
        chain: YAML file of stages, as in the example below
        out: folder of the stages and of report.json and report.md; null: the file's out
        data: value of {data}; null: the file's data
        only: stages with commas; these and what they need
        redo: clear finished stages whose options, recipe, data or earlier stages changed, and run them again
        status: show what is done, stale, interrupted and to do, and run nothing

    Returns:
        the report: ``stages``, a row each, and ``figures`` over the seeds.

    Raises:
        UsageError: a mistake in the file, a missing input, a stale stage without ``redo``, a stage that failed.
        Interrupted: a signal came; the stage that ran has saved what it can.
    """

def data_import(
    source: str,
    out: str,
    captions: str | None = None,
    image_column: str | None = None,
    caption_column: list[str] | str | None = None,
    template: str = 'a photo of a {}.',
    split: str | None = None,
    val_fraction: float = 0.0,
    val_list: str | None = None,
    max_side: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    class_folders: bool = False,
) -> dict[str, Any]:
    """Convert captioned images, in whatever form they are, to WebDataset shards.

    Args:
        source: folder with a captions file, images with sidecars, COCO JSON, class folders, Parquet/Arrow, tars, or a datasets hub id
        out: folder for the shards; an interrupted import resumes and ends with the same shards
        captions: the captions file, if a folder has several
        image_column: image column of a table
        caption_column: caption column of a table; one, or several as [a, b]; each is a caption field
        template: caption of a class folder; {} is the class
        split: split of a hub id
        val_fraction: fraction of the keys that becomes validation data
        val_list: file with the keys or file names of the validation data, one per line
        max_side: shrink images whose longer side is larger, pixels
        shard_size: samples per shard
        workers: number of processes; null: as many as there are cores, at most 8
        class_folders: use the names of the sub-folders as captions (see template), whatever other files there are; by default only if there are two or more and no file that may hold captions
    """

def data_check(
    source: str,
    tokenizer: str | None = None,
    min_side: int = 16,
) -> dict[str, Any]:
    """Check shards before training: counts, sizes, caption lengths, duplicates, unreadable and tiny images.

    Args:
        source: folder, glob, brace pattern or one tar
        tokenizer: count caption lengths in its tokens; null: in those of a BPE trained on the captions, as a run trains it
        min_side: images with a shorter side count as tiny, pixels
    """

def data_browse(
    config: str | None = None,
    options: dict[str, Any] | None = None,
    out: str = 'browse.html',
    count: int = 32,
    open: bool = False,
) -> dict[str, Any]:
    """Write a page of the first samples of a run, as its model will see them: crop, prefix, caption tokens, mixture.

    Values are those of ``pretrain``; the samples are those that a run with the same values trains on first.

    Args:
        config: YAML recipe; without one and without data: the demo's captioned scenes
        options: values by dotted key, which override the recipe's (``{"data.train": "shards", "seed": 1}``)
        out: the page, NAME.html
        count: number of samples on the page
        open: open the page in the browser

    Returns:
        ``page``: its path; ``samples``, ``sources`` (weight, share, drawn), ``caption_tokens``, ``learning_rate``, ...

    Raises:
        UsageError: what ``pretrain`` would refuse, or a page that can't be written.
    """

def data_shapes(
    out: str,
    count: int = 20000,
    size: int = 32,
    largest: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the built-in captioned scenes as shards: shapes with colour, size and place, and unseen validation scenes.

    Args:
        out: folder for the shards
        count: number of training scenes
        size: side in pixels
        largest: height and width of each picture are sampled between SIZE and this, pixels; null: all are SIZE x SIZE
        seed: random seed of the scenes
    """

def data_teach(
    teacher: str,
    data: str,
    out: str,
    views: int = 2,
    crop_scale: float = 0.4,
    crop_ratio: tuple[float, float] = (0.75, 1.3333),
    flip: float = 0.5,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Write a teacher's patch features of random views of each image into new shards, for objective.teacher=stored.

    Args:
        teacher: released name, hub id, folder, RUN, a transformers vision model, or timm:NAME
        data: folder, glob, brace pattern or one tar of shards
        out: folder for the new shards, the same samples with KEY.teacher; an interrupted command continues there
        views: random views of each image; a run samples one of them at each visit
        crop_scale: smallest fraction of the image's area that a crop keeps; the run's data.crop_scale must be the same
        crop_ratio: range of the crop's aspect ratio; as data.crop_ratio
        flip: probability of a horizontal flip; as data.flip
        seed: random seed of crops and flips
        batch_size: views per forward pass
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the matmuls: fp32 or bf16
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def tokenizer_train(
    captions: str,
    out: str,
    vocab_size: int = 4096,
) -> dict[str, Any]:
    """Train a byte-level BPE on captions.

    Args:
        captions: text file with one caption per line, CSV, TSV, JSONL, or a folder or pattern of shards
        out: folder for the tokenizer
        vocab_size: number of tokens, end of text included
    """

def caption(
    model: str,
    images: list[str],
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    data: str | None = None,
    score: bool = False,
    limit: int = 0,
    baselines: str | list[str] | None = None,
    out: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Write captions of images: greedy, sampled, or by beam search; or score such captions against references.

    Args:
        model: a model folder, RUN or RUN@STEP
        images: files or folders of images; none if data are scored
        max_tokens: end of text included; null: as many as the model can write
        temperature: 0 takes the likeliest token each time
        top_p: sample from the smallest set of tokens with this mass, 0 to 1
        beams: more than 1: beam search
        seed: random seed of sampling
        batch_size: images per forward pass
        data: images with reference captions to score against: shards (test-*, else val-*), a folder with captions.txt (image,caption), a captions file
        score: CIDEr, BLEU and exact match of captions of the data; needs the extra aimv2[caption]
        limit: number of the data's images to sample; 0: all
        baselines: of the scores: random (the same model with an untrained encoder); null: none
        out: folder for result.json, if data are scored
        device: cpu, cuda, ...; null: cuda where there is one
    """

def compare(
    results: list[str],
    dataset: str | None = None,
    format: str = 'text',
    plot: str | None = None,
) -> dict[str, Any]:
    """Compare results with one another and with the paper's figures on the same data sets.

    Args:
        results: result files or folders with a result.json, of the evaluation commands or of CLIP_benchmark
        dataset: only results on this data set, by its registered name or the paper's
        format: text, markdown or json
        plot: file of a plot: PNG, PDF or SVG
    """

def models(
) -> dict[str, Any]:
    """List every model: parameters, GFLOPs per image, input size; licence and revision of released ones.
    """

def convert(
    source: str,
    out: str,
    to: str = 'transformers',
    revision: str | None = None,
    precision: str | None = None,
    images: str | None = None,
    samples: int = 300,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write a model in the layout of the tool that will open it.

    Args:
        source: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        out: a new or empty folder
        to: released, transformers, timm, onnx, openvino or safetensors (ours, with the decoder)
        revision: of a hub id
        precision: of openvino: fp32, bf16 or int8
        images: for int8: a folder of images like those that the model will see
        samples: number of these images to read
        licence: of the weights, for the model card
    """

def embed(
    model: str,
    images: str,
    out: str,
    pool: str = 'mean',
    layers: str = 'last',
    format: str = 'npy',
    shard_size: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = 'fp32',
) -> dict[str, Any]:
    """Write features of many images, in files of equal parts; under torchrun several processes share the work.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        images: a folder of images (or of tars, all of them), a text file with one path per line, shards, or one image
        out: folder for the features: features-PPPPP.npy with keys-PPPPP.txt (a key per line, written as in a JSON string), or features-PPPPP.parquet; rejected.jsonl lists what could not be read; an interrupted command continues there
        pool: mean of the patches, attention (models with a pooling head), or none: every patch
        layers: last; or blocks, counted from 0 or from the end, with commas: 5,11,-1
        format: npy (float arrays and lists of keys) or parquet (a column key and a column per layer)
        shard_size: images per file; null: 1000, or for pool none as many as make about 512 MB
        batch_size: images per forward pass
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the matmuls: fp32 (stored as float32) or bf16 (stored as float16)
    """

def probe(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    protocol: Literal['attentive', 'efficient'] = 'attentive',
    features: Literal['cached', 'augmented'] = 'cached',
    layers: str = 'last',
    epochs: int = 100,
    warmup: float = 0.0,
    batch_size: int = 512,
    rates: str | list[float] = '5e-5,1e-4,2e-4,3e-4,5e-4,1e-3,2e-3',
    decays: str | list[float] = '0.05,0.1',
    heads: int | None = None,
    flip: bool = False,
    select: Literal['auto', 'val', 'heldout', 'test'] = 'auto',
    seeds: str | list[int] = '0',
    baselines: str | list[str] | None = None,
    train_limit: int = 0,
    test_limit: int = 0,
    image_size: int | str | None = None,
    trunk_batch: int = 64,
    workers: int = 2,
    device: str | None = None,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Evaluate a frozen encoder by probes on its patch features: the whole grid of learning rates and weight decays at once
    (AIMV2, Table A2).

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model, timm:NAME, or a folder written by convert --to openvino
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: registered name, whose counts are then checked; null: any data set
        protocol: attentive, or efficient (several queries, no key projection)
        features: cached (one forward pass of the encoder, no augmentation) or augmented (random crop, flip, jitter, RandAugment)
        layers: last, avg6, all, or block numbers with commas; all are trained in the same pass
        epochs: passes over the training images
        warmup: warmup epochs (the paper uses 5 for ImageNet)
        batch_size: images per step (the paper uses 1024 for ImageNet)
        rates: peak learning rates of the grid
        decays: weight decays of the grid
        heads: attention heads, or queries; null: width / 64, or 32
        flip: cached features of mirrored images too
        select: where the best head is chosen: auto (the validation split, else a held-out tenth of the training images), val, heldout, or test (as the paper reports it; the result says so)
        seeds: random seeds of heads and order, with commas
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        train_limit: number of training images to sample; 0: all
        test_limit: number of test images to sample; 0: all
        image_size: side in pixels, learned positions interpolated; native: each image at its own size (native models)
        trunk_batch: images per forward pass of the encoder
        workers: processes that augment
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the encoder's matmuls, fp32 or bf16; the heads are fp32
        cache: feature folder shared by several commands; null: in the result's folder
        out: folder for result.json, feature cache and checkpoints; an interrupted command continues there
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def knn(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    k: str | list[int] = '1,5,10,20,50,100,200',
    weights: Literal['uniform', 'distance'] = 'uniform',
    temperature: float = 0.07,
    backend: Literal['auto', 'torch', 'faiss'] = 'auto',
    layers: str = 'last',
    pool: Literal['mean', 'attention'] = 'mean',
    baselines: str | list[str] | None = None,
    train_limit: int = 0,
    test_limit: int = 0,
    image_size: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Evaluate a frozen encoder by its nearest neighbours: no training, cosine similarity, a sweep over k.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model, timm:NAME, or a folder written by convert --to openvino
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: registered name, whose counts are then checked; null: any data set
        k: numbers of neighbours; all are reported, the headline is chosen on the validation split, and is 20 without one
        weights: uniform (one vote each) or distance (votes of exp(cosine / temperature), as in DINO)
        temperature: of the votes by distance
        backend: torch, faiss, or auto (faiss on a CPU where it is installed); both are exact
        layers: last, avg6, all, or block numbers with commas; one forward pass serves all of them
        pool: mean of the patches, or attention (models with a pooling head)
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        train_limit: number of training images to sample; 0: all
        test_limit: number of test images to sample; 0: all
        image_size: side in pixels, learned positions interpolated; native: each image at its own size (native models)
        batch_size: images per forward pass
        seed: random seed of the sampled images and the random baseline
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the encoder's matmuls, fp32 or bf16
        cache: feature folder shared by several commands; null: in the result's folder
        out: folder for result.json and the feature cache; an interrupted command continues there
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def linear(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    solver: Literal['lbfgs', 'sgd'] = 'lbfgs',
    layers: str = 'last',
    baselines: str | list[str] | None = None,
    train_limit: int = 0,
    test_limit: int = 0,
    image_size: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Evaluate a frozen encoder by a linear classifier on the mean of its patch features, following CLIP's protocol.

    The value of the sweep is chosen on the validation split, else on a held-out fifth of the training images; the classifier
    is then fitted on all of them and tested once.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model, timm:NAME, or a folder written by convert --to openvino
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: registered name, whose counts are then checked; null: any data set
        solver: lbfgs (logistic regression, CLIP's search over C) or sgd (a grid of learning rates in one computation)
        layers: last, avg6, all, or block numbers with commas; one forward pass serves all of them, the best on the validation images is reported
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        train_limit: number of training images to sample; 0: all
        test_limit: number of test images to sample; 0: all
        image_size: side in pixels, learned positions interpolated; native: each image at its own size (native models)
        batch_size: images per forward pass
        seed: random seed of held-out images, the order of SGD and the random baseline
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the encoder's matmuls, fp32 or bf16
        cache: feature folder shared by several commands; null: in the result's folder
        out: folder for result.json and the feature cache; an interrupted command continues there
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def fewshot(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    shots: str | list[int] = '1,5,10',
    seeds: int = 5,
    layers: str = 'last',
    baselines: str | list[str] | None = None,
    test_limit: int = 0,
    image_size: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Evaluate a frozen encoder by a classifier fitted on a few images per class, over several draws.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model, timm:NAME, or a folder written by convert --to openvino
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: registered name, whose counts are then checked; null: any data set
        shots: images per class; the headline is of the largest number
        seeds: number of draws
        layers: last, avg6, all, or block numbers with commas; the headline is of last if it is among them, else of the first
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        test_limit: number of test images to sample; 0: all
        image_size: side in pixels, learned positions interpolated; native: each image at its own size (native models)
        batch_size: images per forward pass
        seed: the first random seed; draws and the random baseline follow from it
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the encoder's matmuls, fp32 or bf16
        cache: feature folder shared by several commands; null: in the result's folder
        out: folder for result.json and the feature cache; an interrupted command continues there
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def segment(
    model: str,
    data: str | None = None,
    classes: int | None = None,
    ignore: int = 255,
    reduce_zero: bool = False,
    val_list: str | None = None,
    val_fraction: float = 0.0,
    layers: str = 'last',
    rates: str = '1e-4,3e-4,1e-3,3e-3,1e-2',
    weight_decay: float = 0.0001,
    epochs: int = 20,
    batch_size: int = 16,
    seeds: str | list[int] = '0',
    baselines: str | list[str] | None = None,
    image_size: int | str | None = None,
    trunk_batch: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Segment by a linear probe on frozen patch features: mIoU, 0 to 1.

    Classes that neither occur nor are predicted are left out of the mean.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model, timm:NAME, or a folder written by convert --to openvino
        data: images and masks (PNG of class ids): ROOT/{train,val}/{images,masks}, ROOT/{images,masks}/{train,val} (ADE20K: images/training, annotations/training), or ROOT/{images,masks} with a list or a fraction
        classes: number of classes; null: the largest id in the masks plus one
        ignore: mask value to ignore; -1: none
        reduce_zero: ignore mask value 0 too and move ids down by one (ADE20K)
        val_list: for data without a test split: a file with one image name per line; null: ROOT/val.txt if it exists
        val_fraction: for data without a test split: fraction of images sampled for it
        layers: last, avg6, or block numbers with commas; several are concatenated
        rates: peak learning rates; all are trained at once, one is chosen on a held-out tenth of the training images
        weight_decay: AdamW weight decay, 0 to 1
        epochs: passes over the training images
        batch_size: images per step
        seeds: random seeds of weights and order, with commas
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        image_size: side in pixels, learned positions interpolated; native: each image at its own size (native models)
        trunk_batch: images per forward pass of the encoder
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder for result.json and the feature cache
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def depth(
    model: str,
    data: str | None = None,
    depth_scale: float = 1000.0,
    val_list: str | None = None,
    val_fraction: float = 0.0,
    layers: str = 'last',
    rates: str = '1e-4,3e-4,1e-3,3e-3,1e-2',
    weight_decay: float = 0.0001,
    epochs: int = 20,
    batch_size: int = 16,
    seeds: str | list[int] = '0',
    baselines: str | list[str] | None = None,
    image_size: int | str | None = None,
    trunk_batch: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Estimate depth by a linear probe on frozen patch features: RMSE in metres, abs-rel, delta1 (ratio below 1.25).

    The probe is a linear regression of metres by least squares, kept within the range of the training depths.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model, timm:NAME, or a folder written by convert --to openvino
        data: images and depth maps (16-bit PNG, 0 where there is no value): ROOT/{train,val}/{images,depth}, ROOT/{images,depth}/{train,val}, or ROOT/{images,depth} with a list or a fraction
        depth_scale: units of the depth maps per metre
        val_list: for data without a test split: a file with one image name per line; null: ROOT/val.txt if it exists
        val_fraction: for data without a test split: fraction of images sampled for it
        layers: last, avg6, or block numbers with commas; several are concatenated
        rates: peak learning rates; all are trained at once, one is chosen on a held-out tenth of the training images
        weight_decay: AdamW weight decay, 0 to 1
        epochs: passes over the training images
        batch_size: images per step
        seeds: random seeds of weights and order, with commas
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        image_size: side in pixels, learned positions interpolated; native: each image at its own size (native models)
        trunk_batch: images per forward pass of the encoder
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder for result.json and the feature cache
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def zeroshot(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    templates: str = 'default',
    classes: str | None = None,
    by: Literal['auto', 'contrastive', 'likelihood'] = 'auto',
    normalize: Literal['prior', 'sum', 'mean'] = 'prior',
    limit: int = 0,
    seed: int = 0,
    baselines: str | list[str] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Classify images by the texts of their classes, without training: top-1, top-5, by class (AIMV2, Table 5).

    Args:
        model: a LiT pair, a folder or hub id of a transformers pair such as CLIP or SigLIP, or a model that kept its decoder: RUN, RUN@STEP, or a folder written by convert --to safetensors
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: registered name, whose counts are then checked; null: any data set
        templates: default (three for photographs; of a pair on imagenet1k CLIP's eighty), imagenet (these eighty), one with {} for the class, or a file with one per line
        classes: file of class names, one per line in the order of the labels; null: the data set's own
        by: contrastive (the two towers of a pair), likelihood (of the texts, by the decoder), or auto: what the model has
        normalize: of the likelihood: sum, mean (per token), or prior (the sum minus the text's log-likelihood over other, unlabelled images)
        limit: number of images to sample; 0: all
        seed: random seed of the sampled images
        baselines: random (the same model with an untrained encoder); null: none
        batch_size: images per forward pass
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder for result.json
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def retrieve(
    model: str,
    data: str | None = None,
    captions: str | None = None,
    candidates: int | None = None,
    k: str | list[int] = '1,5,10',
    by: Literal['auto', 'contrastive', 'likelihood'] = 'auto',
    normalize: Literal['prior', 'sum', 'mean'] = 'prior',
    seed: int = 0,
    baselines: str | list[str] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Find the image of a caption and a caption of an image: recall at k, both ways, with chance.

    Args:
        model: a LiT pair, a folder or hub id of a transformers pair such as CLIP or SigLIP, or a model that kept its decoder: RUN, RUN@STEP, or a folder written by convert --to safetensors
        data: shards with captions (test-*, else val-*, else train-*), a folder of images with a captions file (image,caption) or sidecars, or a captions file next to its images
        captions: the captions file, if a folder has several; null: captions.txt
        candidates: number of images to sample, which are searched with all their captions; null: 100 by likelihood, all for a pair
        k: ranks that count as found, with commas
        by: contrastive (the two towers of a pair), likelihood (of the texts, by the decoder), or auto: what the model has
        normalize: of the likelihood, for image to text (text to image is the same with all): sum, mean (per token), or prior (the sum minus the caption's log-likelihood over up to 100 other images)
        seed: random seed of the candidates
        baselines: random (the same model with an untrained encoder); null: none
        batch_size: images per forward pass
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder for result.json
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def report(
    runs: list[str],
    out: str | None = None,
    images: int = 6,
    device: str | None = None,
    watch: float | None = None,
) -> dict[str, Any]:
    """Write a page of what a run has learned; for several runs their curves, figures and differences.

    Args:
        runs: run folders, training or finished
        out: the page, NAME.html, or a folder for it; null: report.html in the run folder, for several runs in the working folder. Pictures go into a folder of the same name next to it
        images: held-out images per section
        device: of the model, such as cuda; null: the CPU
        watch: seconds until the page is written again, until the runs end; the page reloads itself

    Returns:
        ``report``: its path; ``pictures``, ``bytes``, ``sections``, and ``left_out``: reasons by section.
    """

def explore(
    model: str,
    images: str | None = None,
    other: str | None = None,
    limit: int = 200,
    host: str = '127.0.0.1',
    port: int = 8421,
    open: bool = False,
    upload_mb: float = 10.0,
    device: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Explore a model in the browser: features, similar patches, attention, captions, next patches, search by text.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a decoder adds captions, painting and search, a LiT pair search; of a vision model of transformers or timm:NAME its features
        images: a folder of images, a text file with one path per line, shards, or a folder that embed wrote (pool attention for a pair, none for others: its pictures are then not encoded again); null: captioned scenes, drawn on the spot
        other: a second model, shown next to the first
        limit: images of the folder, the first; 0: all
        host: address to listen on; any but the default lets other machines in
        port: port to listen on; 0: a free one
        open: open the page in the browser
        upload_mb: largest picture that the page may send, MB
        device: cpu, cuda, ...; null: cuda where there is one
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

def doctor(
    quick: bool = False,
) -> dict[str, Any]:
    """Check this machine: versions, devices, kernels, hub, disk, process groups, and a tiny run with timing.

    The command ends with exit code 0 if nothing failed, else with 1.

    Args:
        quick: leave out the tiny run, which trains, saves and loads a model

    Returns:
        ``checks``: a list of group, name, status (ok, off = not here and not needed, warn, fail), found, advice, seconds;
        ``failed`` and ``warned``: how many.
    """

def push(
    model: str,
    repository: str,
    to: str = 'transformers',
    private: bool = False,
    licence: str | None = None,
    message: str = 'Upload an AIMV2 encoder',
) -> dict[str, Any]:
    """Upload a model to the hub, with its card.

    Args:
        model: a folder, .safetensors file, RUN or RUN@STEP
        repository: owner/name on the hub; created if it does not exist
        to: the layout: transformers, released, timm, onnx or safetensors (ours, with the decoder)
        private: make a new repository private
        licence: of the weights, for the model card
        message: of the commit
    """
