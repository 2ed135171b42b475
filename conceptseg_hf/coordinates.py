"""Coordinate transforms of one sample between image pixels, the mosaic canvas, text coordinates and SAM 3's prompt.

For an image of size (w, h), canvas size S and coordinate scale C:

    image -> canvas   x * S / w, y * S / h for the target; `MosaicLayout.image_to_canvas` for references
    canvas -> text    * C / S; x2 and y2 are the last canvas pixel with inclusive corners, one past it with exclusive
                      corners
    image -> SAM      (center x, center y, width, height) as fractions of the image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .boxes import Box, box_iou, enclosing_box
from .mosaic import MosaicLayout, MosaicSettings, assign_cells, make_layout
from .references import ResolvedReferences


@dataclass(frozen=True)
class CoordinateFrame:
    """Coordinate frames of a sample, and the transforms between them.

    Attributes:
        image_size: (width, height) of the target image after EXIF rotation.
        reference_sizes: (width, height) of each reference.
        layout: The mosaic layout, or None without references.
        cell_of_reference: Mosaic cell of each reference; references whose cell is outside the layout are not shown.
        proxy: Index of the proxy query among the references, or None.
        proxy_boxes: Withheld boxes of the proxy query, in pixels of that reference; empty if unknown.
        support_boxes: Boxes of the support references, in text units of the mosaic, in the order of the references.
        canvas_size: Side of the VLM's square canvas, in pixels.
        coordinate_scale: Length of a canvas side in text coordinates.
        inclusive_corners: Whether x2 and y2 of boxes in the text are the last canvas pixel (inclusive); see
            `MosaicSettings.corners`.
        encloses_boxes: Whether a check is compared with the box that encloses all withheld boxes instead of the best
            matching one; see `MosaicSettings.several_boxes`.
    """

    image_size: tuple[int, int]
    reference_sizes: tuple[tuple[int, int], ...] = ()
    layout: MosaicLayout | None = None
    cell_of_reference: tuple[int, ...] = ()
    proxy: int | None = None
    proxy_boxes: tuple[Box, ...] = ()
    support_boxes: tuple[Box, ...] = ()
    canvas_size: int = 600
    coordinate_scale: float = 1.0
    inclusive_corners: bool = False
    encloses_boxes: bool = False

    @property
    def proxy_box(self) -> Box | None:
        """The withheld box, or the box that encloses all withheld boxes; None if there are none."""
        return enclosing_box(self.proxy_boxes)

    # The target image

    def image_box_to_text(self, box: Sequence[float]) -> Box:
        """Map a box from pixels of the target image to text units."""
        width, height = self.image_size
        scaled = _scaled(box, self.coordinate_scale / width, self.coordinate_scale / height)
        return self._with_text_corners(scaled)

    def text_box_to_image(self, box: Sequence[float]) -> Box:
        """Map a box from text units to pixels of the target image and clip it; the inverse of `image_box_to_text`."""
        width, height = self.image_size
        box = self._without_text_corners(box)
        return _clipped(
            _scaled(box, width / self.coordinate_scale, height / self.coordinate_scale), self.image_size
        )

    def text_box_to_sam(self, box: Sequence[float]) -> Box:
        """Map a box from text units to SAM 3's (center x, center y, width, height) in fractions of the image."""
        width, height = self.image_size
        x1, y1, x2, y2 = self.text_box_to_image(box)
        return (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height

    # References

    def reference_box_to_text(self, box: Sequence[float], reference: int) -> Box:
        """Map a box from pixels of a reference to text units of the mosaic.

        Raises:
            ValueError: If there are no references.
        """
        if self.layout is None:
            raise ValueError(
                "cannot map a box to the mosaic, since this sample has no references; prepare it with references."
            )
        canvas = self.layout.image_to_canvas(
            box, self.cell_of_reference[reference], self.reference_sizes[reference]
        )
        return self._with_text_corners(_scaled(canvas, self.coordinate_scale / self.canvas_size))

    def text_box_to_reference(self, box: Sequence[float]) -> tuple[int, Box] | tuple[None, None]:
        """Map a mosaic box from text units to pixels of the reference that contains its center.

        Returns:
            The reference's index and the box clipped to the reference; (None, None) if there are no references or the
            cell is empty.
        """
        if self.layout is None:
            return None, None
        canvas = _scaled(self._without_text_corners(box), self.canvas_size / self.coordinate_scale)
        cell = self.layout.cell_at(canvas)
        if cell not in self.cell_of_reference:
            return None, None
        reference = self.cell_of_reference.index(cell)
        size = self.reference_sizes[reference]
        return reference, _clipped(self.layout.canvas_to_image(canvas, cell, size), size)

    # The check

    @property
    def check_boxes(self) -> list[Box]:
        """Ground-truth boxes of the check: the proxy query's withheld boxes, in text units.

        Empty if there is no proxy query or it has no boxes; a single enclosing box if `encloses_boxes` is set.
        """
        if self.proxy is None or (enclosing := self.proxy_box) is None:
            return []
        boxes = (enclosing,) if self.encloses_boxes else self.proxy_boxes
        return [self.reference_box_to_text(box, self.proxy) for box in boxes]

    @property
    def check_box(self) -> Box | None:
        """Ground truth of `<check>`, in text units: the largest of `check_boxes`; None if there are none."""
        return max(self.check_boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), default=None)

    def check_iou(self, check: Sequence[float] | None) -> float | None:
        """Compute the IoU of a `<check>` box with the best matching box of `check_boxes`, both in text units.

        Returns:
            The IoU; 0 if `check` is None, None if there is no ground-truth box.
        """
        ground_truths = self.check_boxes
        if not ground_truths:
            return None
        return 0.0 if check is None else max(box_iou(check, ground_truth) for ground_truth in ground_truths)

    # Corners

    @property
    def _text_pixel(self) -> float:
        """Size of a canvas pixel in text units with inclusive corners, else 0."""
        return self.coordinate_scale / self.canvas_size if self.inclusive_corners else 0.0

    def _with_text_corners(self, box: Box) -> Box:
        pixel = self._text_pixel
        if not pixel:
            return box
        x1, y1, x2, y2 = box
        return x1, y1, max(x1, x2 - pixel), max(y1, y2 - pixel)

    def _without_text_corners(self, box: Sequence[float]) -> Box:
        """Invert `_with_text_corners`; the empty box [0, 0, 0, 0] stays empty."""
        x1, y1, x2, y2 = box
        pixel = self._text_pixel if any(box) else 0.0
        return x1, y1, x2 + pixel, y2 + pixel


def make_frame(
    image_size: tuple[int, int],
    references: ResolvedReferences | None,
    settings: MosaicSettings,
    canvas_size: int,
    coordinate_scale: float,
) -> CoordinateFrame:
    """Create the coordinate frame of a target image and its references.

    Args:
        image_size: (width, height) of the target.
        references: References of the target, or None.
        settings: Layout of the references and handling of their boxes.
        canvas_size: See `CoordinateFrame`.
        coordinate_scale: See `CoordinateFrame`.
    """
    frame = CoordinateFrame(
        image_size=image_size,
        canvas_size=canvas_size,
        coordinate_scale=coordinate_scale,
        inclusive_corners=settings.corners == "inclusive",
        encloses_boxes=settings.several_boxes == "enclosing",
    )
    if references is None or not references.images:
        return frame
    count, proxy = len(references.images), references.proxy
    layout = make_layout(count, canvas_size, settings)
    frame = replace(
        frame,
        reference_sizes=tuple(image.size for image in references.images),
        layout=layout,
        cell_of_reference=assign_cells(count, proxy),
        proxy=proxy,
        proxy_boxes=() if proxy is None else references.all_boxes[proxy],
    )
    support_boxes = [
        frame.reference_box_to_text(box, index)
        for index, boxes in enumerate(references.all_boxes)
        for box in boxes
        if index != proxy and frame.cell_of_reference[index] in layout
    ]
    return replace(frame, support_boxes=tuple(support_boxes))


def _scaled(box: Sequence[float], scale_x: float, scale_y: float | None = None) -> Box:
    scale_y = scale_x if scale_y is None else scale_y
    x1, y1, x2, y2 = box
    return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y


def _clipped(box: Box, size: tuple[int, int]) -> Box:
    width, height = map(float, size)
    x1, y1, x2, y2 = box
    return (
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
        min(max(x2, 0.0), width),
        min(max(y2, 0.0), height),
    )


__all__ = ["CoordinateFrame", "make_frame"]
