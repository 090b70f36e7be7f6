"""The pages, and the packaged data, that are made from the records in `benchmarks/results`."""

from .batch import BATCH
from .choosing import CHOOSING
from .conversion import CONVERSION
from .faster import FASTER
from .fidelity import FIDELITY
from .fidelity_page import FIDELITY_PAGE
from .frames import FRAMES
from .kernels import KERNELS
from .older_gpus import OLDER_GPUS
from .performance import PERFORMANCE, README
from .report import REPORT
from .serving import SERVING
from .several import SEVERAL

PAGES = (
    PERFORMANCE,
    CONVERSION,
    KERNELS,
    OLDER_GPUS,
    REPORT,
    SERVING,
    SEVERAL,
    FRAMES,
    BATCH,
    CHOOSING,
    README,
    FIDELITY,
    FIDELITY_PAGE,
    FASTER,
)
