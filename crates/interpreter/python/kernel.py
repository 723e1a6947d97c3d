"""Runs once in every new IPython kernel, before any of the user's code.

Makes the kernel show what E2B's clients read besides the usual: data frames as `e2b/data`,
figures of matplotlib as `e2b/chart`, lists and dictionaries as JSON. Nothing that a user may or may
not import is imported here: a formatter looks for a library among those that are loaded, and the
changes to a library are made when it is loaded.

`CHARTS`, the source of the module that reads figures, is put among the globals by whoever runs this.
"""

import importlib.abc
import json
import math
import sys

from IPython import get_ipython
from IPython.core.formatters import BaseFormatter, JSONFormatter
from traitlets import ObjectName, Unicode

LOADED_CHARTS = {}


def charts():
    """The module that reads figures, made from its source on first use."""
    if not LOADED_CHARTS:
        exec(compile(CHARTS, "<cubicle>", "exec"), LOADED_CHARTS)  # noqa: F821
    return LOADED_CHARTS


def plain(value):
    """A cell of a table as something that JSON has."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    pandas = sys.modules["pandas"]
    if value is pandas.NaT or value is pandas.NA:
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


class DataFormatter(BaseFormatter):
    """A data frame, column by column."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict

    def __call__(self, value):
        pandas = sys.modules.get("pandas")
        frame = getattr(pandas, "DataFrame", None)
        if frame is None or not isinstance(value, frame):
            return super().__call__(value)
        return {
            str(name): [plain(cell) for cell in column.tolist()]
            for name, column in value.items()
        }


class ChartFormatter(BaseFormatter):
    """What a figure of matplotlib shows."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def __call__(self, value):
        module = sys.modules.get("matplotlib.figure")
        figure = getattr(module, "Figure", None)
        if figure is None or not isinstance(value, figure):
            return super().__call__(value)
        try:
            return charts()["chart"](value)
        except Exception:
            # A figure that this cannot read is still shown as an image.
            return {"type": "unknown", "title": None, "elements": []}


class PlainJSONFormatter(JSONFormatter):
    """Lists and dictionaries that JSON can hold, as well as what shows itself as JSON."""

    def __call__(self, value):
        if isinstance(value, (list, dict)):
            try:
                text = json.dumps(value, allow_nan=False, default=self.scalar)
                return json.loads(text), {"expanded": True}
            except (TypeError, ValueError, RecursionError):
                pass
        return super().__call__(value)

    @staticmethod
    def scalar(value):
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError


def show_saved_images(module):
    """An image that is saved to a file is also shown."""
    save = module.Image.save

    def shown(self, fp, format=None, **options):
        result = save(self, fp, format, **options)
        if isinstance(fp, str):
            from IPython.display import display

            display(self)
        return result

    module.Image.save = shown


def stay_without_a_screen(module):
    """There is none that an external program could show an image on."""
    module.UnixViewer.show_file = lambda self, path, **options: 0


def remember_boxes(module):
    """What a box plot was drawn from is nowhere to be found afterwards."""
    draw = module.Axes.bxp

    def bxp(self, bxpstats, *arguments, **options):
        stats = list(bxpstats)
        drawn = draw(self, stats, *arguments, **options)
        self.__dict__.setdefault("_cubicle_boxes", []).extend(stats)
        return drawn

    bxp.__doc__ = draw.__doc__
    bxp.__wrapped__ = draw
    module.Axes.bxp = bxp


WHEN_LOADED = {
    "PIL.Image": show_saved_images,
    "PIL.ImageShow": stay_without_a_screen,
    "matplotlib.axes._axes": remember_boxes,
}


class Watcher(importlib.abc.MetaPathFinder):
    """Changes a module right after it has been loaded."""

    def find_spec(self, name, path=None, target=None):
        change = WHEN_LOADED.pop(name, None)
        if change is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    break
        else:
            return None
        if not hasattr(spec.loader, "exec_module"):
            return spec
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            try:
                change(module)
            except Exception:
                # Another version of the library: it goes on unchanged.
                pass

        spec.loader.exec_module = exec_module
        return spec


def quicken(stream):
    """Lets a flush of nothing do nothing. The kernel flushes its streams several times for each cell,
    and each time two threads wait for each other."""
    flush = stream.flush

    def flush_what_there_is():
        if stream._buffers or stream._flush_pending:
            flush()

    if hasattr(stream, "_buffers") and hasattr(stream, "_flush_pending"):
        stream.flush = flush_what_there_is


def install(shell):
    quicken(sys.stdout)
    quicken(sys.stderr)
    shell.kernel._execute_sleep = 0
    shell.colors = "NoColor"
    display = shell.display_formatter
    display.formatters["text/plain"].max_seq_length = 0
    for formatter in (DataFormatter, ChartFormatter, PlainJSONFormatter):
        made = formatter(parent=display)
        display.formatters[made.format_type] = made
    sys.meta_path.insert(0, Watcher())
    # Once, so that the first value a user sees does not wait for what this loads.
    display.format(2)


install(get_ipython())
