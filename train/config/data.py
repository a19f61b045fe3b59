"""The data sections: text and images."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from train.config.sections import Paths, Section, as_integer

GPT2_VOCAB_SIZE = 50257


class TextData(Section):
    """Text: where it comes from, what is held out, and the tokenizer."""

    source: Paths = Field(default=["shakespeare"])
    """shakespeare (shipped); files, folders, globs or URIs of .txt, .md, .jsonl or .parquet; or
    hf:NAME."""
    text_column: str = "text"
    """The column or key that holds the text in .jsonl and .parquet."""
    heldout: Paths | None = None
    """Files for evaluation only (default: the documents that the source itself holds out, else
    heldout_fraction)."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """What is held out where the source holds nothing out itself: this fraction of the documents
    of .jsonl and .parquet, and of the end of each .txt and .md."""
    tokenizer: str = "bpe"
    """bpe: trained on the corpus; gpt2: GPT-2's (shipped); or a pretrained tokenizer's folder or
    tokenizer.json."""
    vocab_size: Annotated[int, Field(ge=257, le=2**31)] = 2048
    """Entries of a tokenizer trained here (256 bytes and the end-of-text token included)."""

    @property
    def known_vocab_size(self) -> int:
        """Vocabulary size as far as it is known before a pretrained tokenizer is read."""
        return GPT2_VOCAB_SIZE if self.tokenizer == "gpt2" else self.vocab_size


class ImageData(Section):
    """Images: where they come from, their size, and augmentation."""

    source: Paths = Field(default=["fashion-mnist"])
    """fashion-mnist or emoji (shipped; emoji are in color); a folder of class folders or of
    images; parquet files; torchvision:NAME; or hf:NAME."""
    image_column: str = "image"
    """The column of parquet files that holds the encoded images."""
    label_column: str = "label"
    """The column of parquet files that holds the classes, as numbers or names."""
    size: Annotated[Literal[28, 32, 64, 128], BeforeValidator(as_integer)] = 32
    """Height and width in pixels."""
    channels: Annotated[Literal[1, 3], BeforeValidator(as_integer)] = 1
    """1: grayscale; 3: color."""
    random_crop: bool = False
    """Resize to an eighth more than `size`, and crop at a random position."""
    horizontal_flip: bool = True
    """Mirror each image with probability 1/2."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The fraction of images that is held out where the source does not hold out any itself."""
