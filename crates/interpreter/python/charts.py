"""Reads what a figure of matplotlib shows, in the shapes that E2B's clients know.

A chart is a dictionary with `type`, `title` and `elements`; all but pies and what is unknown have
labels and units of both axes, and lines and points their ticks and scales besides.
"""

import datetime
import re

import matplotlib.dates
from matplotlib.category import StrCategoryConverter
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.patches import Wedge

SCALES = {
    "linear",
    "log",
    "symlog",
    "logit",
    "function",
    "functionlog",
    "asinh",
}


def chart(figure):
    """The chart in a figure; of several, all; of none, nothing."""
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    if not any(ax.has_data() for ax in axes):
        return {}
    title = figure.get_suptitle() if hasattr(figure, "get_suptitle") else None
    if len(axes) > 1:
        return {
            "type": "superchart",
            "title": title or None,
            "elements": [read(ax) for ax in axes],
        }
    found = read(axes[0])
    found["title"] = found["title"] or title or None
    return found


def read(ax):
    """The chart on one pair of axes: the kind that says most about what is there."""
    title = ax.get_title() or None
    boxes = getattr(ax, "_cubicle_boxes", None)
    wedges = [patch for patch in ax.patches if isinstance(patch, Wedge)]
    bars = [drawn for drawn in ax.containers if isinstance(drawn, BarContainer)]
    lines = [line for line in ax.lines if is_data(ax, line)]
    points = [drawn for drawn in ax.collections if isinstance(drawn, PathCollection)]
    if boxes:
        return {"type": "box_and_whisker", "title": title, **names(ax), **box_elements(ax, boxes)}
    if wedges and not lines:
        return {"type": "pie", "title": title, "elements": [pie_element(w) for w in wedges]}
    if bars and not points:
        return {"type": "bar", "title": title, **bar_elements(ax, bars)}
    if lines:
        elements = [line_element(ax, line) for line in lines]
        return {"type": "line", "title": title, **names(ax), **scales(ax), "elements": elements}
    if points:
        elements = [point_element(ax, drawn) for drawn in points]
        return {"type": "scatter", "title": title, **names(ax), **scales(ax), "elements": elements}
    return {"type": "unknown", "title": title, "elements": []}


def is_data(ax, line):
    """Whether a line is drawn through data, and not across the whole axes."""
    both = line.get_transform().contains_branch_seperately(ax.transData)
    return all(both) and len(line.get_xdata()) > 0


def names(ax, swapped=False):
    x, y = (ax.get_xlabel() or None), (ax.get_ylabel() or None)
    if swapped:
        x, y = y, x
    return {"x_label": x, "y_label": y, "x_unit": unit(x), "y_unit": unit(y)}


def unit(label):
    """`s` of `Time (s)`."""
    found = re.search(r"\(([^()]*)\)\s*$", label or "")
    return found.group(1).strip() or None if found else None


def scales(ax):
    return {**scale("x", ax.xaxis), **scale("y", ax.yaxis)}


def scale(prefix, axis):
    positions = [float(position) for position in axis.get_majorticklocs()]
    labels = axis.get_major_formatter().format_ticks(positions)
    kind = kind_of(axis)
    ticks = positions
    if kind == "datetime":
        ticks = [matplotlib.dates.num2date(position).isoformat() for position in positions]
    return {
        f"{prefix}_ticks": ticks,
        f"{prefix}_tick_labels": [str(label) for label in labels],
        f"{prefix}_scale": kind,
    }


def kind_of(axis):
    converter = axis.get_converter() if hasattr(axis, "get_converter") else axis.converter
    name = type(converter).__name__
    if isinstance(converter, StrCategoryConverter):
        return "categorical"
    if "Date" in name or "Period" in name:
        return "datetime"
    return axis.get_scale() if axis.get_scale() in SCALES else "unknown"


def value(axis, raw):
    """A coordinate: a number, or a text if the axis has dates or categories."""
    if isinstance(raw, (str, bytes)):
        return raw if isinstance(raw, str) else raw.decode(errors="replace")
    if isinstance(raw, datetime.date):
        return raw.isoformat()
    if hasattr(raw, "dtype") and raw.dtype.kind == "M":
        return str(raw.astype("datetime64[s]"))
    kind = kind_of(axis)
    if kind == "datetime" and not hasattr(raw, "isoformat"):
        return matplotlib.dates.num2date(float(raw)).isoformat()
    if hasattr(raw, "isoformat"):
        return raw.isoformat()
    if kind == "categorical":
        position = round(float(raw))
        for name, index in axis.units._mapping.items():
            if index == position:
                return str(name)
    number = float(raw)
    # What JSON has no number for is not drawn either.
    return number if number - number == 0 else None


def pairs(ax, xs, ys):
    points = ((value(ax.xaxis, x), value(ax.yaxis, y)) for x, y in zip(xs, ys))
    return [[x, y] for x, y in points if x is not None and y is not None]


def named(artist, prefix, fallback):
    """The label that a user gave, or a number."""
    label = str(artist.get_label())
    if label.startswith(prefix):
        return f"{fallback} {label[len(prefix):]}"
    return label


def line_element(ax, line):
    return {
        "label": named(line, "_child", "Line"),
        "points": pairs(ax, line.get_xdata(), line.get_ydata()),
    }


def point_element(ax, drawn):
    offsets = drawn.get_offsets()
    return {
        "label": named(drawn, "_child", "Points"),
        "points": pairs(ax, offsets[:, 0], offsets[:, 1]),
    }


def pie_element(wedge):
    return {
        "label": str(wedge.get_label()),
        "angle": rounded(abs(wedge.theta2 - wedge.theta1)),
        "radius": rounded(wedge.r),
    }


def rounded(number):
    """Without the noise of single precision."""
    return round(float(number), 4)


def bar_elements(ax, bars):
    lying = all(getattr(group, "orientation", None) == "horizontal" for group in bars)
    axis = ax.yaxis if lying else ax.xaxis
    elements = []
    for group in bars:
        name = named(group, "_container", "Group")
        for patch in group.patches:
            if lying:
                centre, size = patch.get_y() + patch.get_height() / 2, patch.get_width()
            else:
                centre, size = patch.get_x() + patch.get_width() / 2, patch.get_height()
            label = tick_label(axis, centre, abs(patch.get_height() if lying else patch.get_width()))
            elements.append({"label": label, "group": name, "value": rounded(size)})
    return {**names(ax, swapped=lying), "elements": elements}


def tick_label(axis, position, width):
    """What stands below a bar: the label of a tick that is no farther than the bar is wide, or
    where the bar is."""
    ticks = [float(tick) for tick in axis.get_majorticklocs()]
    labels = axis.get_major_formatter().format_ticks(ticks)
    near = min(zip(ticks, labels), key=lambda tick: abs(tick[0] - position), default=None)
    fixed = kind_of(axis) != "linear" or type(axis.get_major_formatter()).__name__ == "FixedFormatter"
    if near is not None and near[1] and (fixed or near[0] == position) and abs(near[0] - position) <= width:
        return str(near[1])
    place = value(axis, position)
    return place if isinstance(place, str) else f"{place:g}"


def box_elements(ax, boxes):
    elements = []
    for number, box in enumerate(boxes, start=1):
        label = box.get("label")
        elements.append(
            {
                "label": str(number if label is None else label),
                "min": rounded(box["whislo"]),
                "first_quartile": rounded(box["q1"]),
                "median": rounded(box["med"]),
                "third_quartile": rounded(box["q3"]),
                "max": rounded(box["whishi"]),
                "outliers": [rounded(outlier) for outlier in box.get("fliers", [])],
            }
        )
    return {"elements": elements}
