// Masks painted over an image, white where it counts, with brush, eraser and fill, by mouse and by keys. The Dataset tab's is
// saved beside the image after each stroke; the former mask comes back with Cancel, and with Ctrl+Z once the editor is left.
// `easel.paintMask` opens one elsewhere.
(() => {
  const easel = window.easel;
  const { one, all, post, request, t } = easel;
  const MOST = 1024, MOST_STEPS = 30, TOOLS = ["brush", "eraser", "fill"];

  // While a mask is edited: within what, its context, tool, size, where the pen is and its steps; what a `stroke` and the
  // `end` ("done", "remove" or "cancel") do.
  let paint = null;

  const canvas = () => paint.context.canvas;
  const snapshot = () => paint.context.getImageData(0, 0, canvas().width, canvas().height);
  // The painted mask; null for nothing: an all-black mask is none.
  const painted = () => (snapshot().data.some((value, index) => index % 4 < 3 && value) ? canvas().toDataURL("image/png").split(",")[1] : null);
  const keep = () => {
    paint.past.push(snapshot());
    paint.past.splice(0, paint.past.length - MOST_STEPS);
    paint.future = [];
  };
  const stepBack = (forward) => {
    const [from, into] = forward ? [paint.future, paint.past] : [paint.past, paint.future], image = from.pop();
    if (!image) return;
    into.push(snapshot());
    paint.context.putImageData(image, 0, 0);
    paint.stroke();
  };

  const showTools = () => {
    for (const button of all("[data-mask-tool]", paint.within)) button.setAttribute("aria-pressed", button.dataset.maskTool === paint.tool);
    one("[data-mask-size]", paint.within).value = paint.size;
    const ring = one(".pen", paint.within), [x, y] = paint.at, { width, height } = canvas();
    Object.assign(ring.style, { left: `${100 * x / width}%`, top: `${100 * y / height}%`, width: `${100 * paint.size / width}%` });
    ring.hidden = paint.tool === "fill";
  };
  const resize = (size) => { paint.size = Math.min(400, Math.max(4, Math.round(size))); showTools(); };

  const line = (from, to) => {
    const { context } = paint, colour = paint.tool === "eraser" ? "black" : "white";
    Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: paint.size, lineCap: "round" });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    // A line without length draws nothing.
    context.beginPath();
    context.arc(...to, paint.size / 2, 0, 2 * Math.PI);
    context.fill();
  };
  // A stroke may end outside of the image.
  const within = (at) => at.map((value, axis) => Math.min([canvas().width, canvas().height][axis] - 1, Math.max(0, value)));
  // Fills what surrounds a point and is on its side of grey, with white, or with black where it is white.
  const fill = (at) => {
    const image = snapshot(), { width, height, data } = image, [x, y] = within(at).map(Math.floor), start = y * width + x;
    const white = data[4 * start] > 127, value = white ? 0 : 255, waiting = [start], inside = (index) => data[4 * index] > 127 === white;
    while (waiting.length) {
      let left = waiting.pop();
      if (!inside(left)) continue;
      const row = left - left % width;
      while (left > row && inside(left - 1)) left -= 1;
      for (let index = left; index < row + width && inside(index); index += 1) {
        data[4 * index] = data[4 * index + 1] = data[4 * index + 2] = value;
        if (row) waiting.push(index - width);
        if (row < width * (height - 1)) waiting.push(index + width);
      }
    }
    paint.context.putImageData(image, 0, 0);
  };
  const press = (to) => { keep(); if (paint.tool === "fill") fill(to); else line(to, to); };

  const enter = (state) => {
    paint = state;
    one(".frame", state.within).classList.add("painting");
    one(".mask-bar", state.within).hidden = canvas().hidden = false;
    showTools();
    canvas().focus();
  };
  const leave = () => {
    const { within } = paint;
    one(".frame", within).classList.remove("painting");
    one(".mask-bar", within).hidden = canvas().hidden = one(".pen", within).hidden = true;
    paint = null;
  };
  // A mask over an image of those sides, begun with the one at an address if there is one.
  const begin = async (within, [wide, high], address, own) => {
    const place = one("canvas", within), scale = Math.min(1, MOST / Math.max(wide, high));
    [place.width, place.height] = [Math.max(1, Math.round(wide * scale)), Math.max(1, Math.round(high * scale))];
    const context = place.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "black";
    context.fillRect(0, 0, place.width, place.height);
    if (address) {
      const image = new Image();
      image.src = address;
      await image.decode();
      context.drawImage(image, 0, 0, place.width, place.height);
    }
    const size = Math.round(Math.max(place.width, place.height) / 8);
    return { within, context, tool: "brush", size, at: [place.width / 2, place.height / 2], past: [], future: [], pen: null, ...own };
  };
  // Opens an editor in `within`; answers what closes it. An unchanged mask keeps its file, which may be larger than the canvas.
  easel.paintMask = async (within, sides, address, end) => {
    paint?.end("done");
    const state = await begin(within, sides, address, { stroke: () => {}, end: (how) => {
      const png = how === "done" ? painted() : null, same = how === "done" && png === state.before;
      end(same ? null : png, same ? "cancel" : how);
    } });
    enter(state);
    state.before = painted();
    return () => { if (paint === state) leave(); };
  };

  // ---- the mask of an image of the dataset ------------------------------------------------------------------------
  // Not where another image was chosen meanwhile.
  const open = (state) => { if (!paint && easel.chosenPicture()?.name === state.name) enter(state); };
  const start = async () => {
    const picture = easel.chosenPicture();
    if (!picture || paint) return;
    // `was` has each file that is written, as it was.
    const own = { name: picture.name, had: Boolean(picture.mask), was: {}, stroke: store, end: finish };
    const state = await begin(one("#picture-detail"), picture.whole, picture.mask && `/easel/picture/dataset/${picture.mask}`, own);
    open(state);
    if (paint === state) state.before = painted();
  };
  const send = (state, body) => request("mask", { picture: state.name, ...body });
  // Writes a mask; null removes it, and those that it took the place of.
  const write = async (state, png) => {
    let answer;
    do {
      answer = await send(state, { png });
      if (!answer) return false;
      if (!(answer.file in state.was)) state.was[answer.file] = answer.before;
    } while (png === null && answer.left);
    return true;
  };
  const putBack = async (state) => {
    for (const [file, png] of Object.entries(state.was)) if (!(await send(state, { png, put_back: file }))) return false;
    return true;
  };
  // Saves after a stroke: one request at a time, and of strokes that wait only the last.
  const store = () => {
    const state = paint;
    state.due = painted();
    state.storing ??= (async () => {
      let sent;
      do { sent = state.due; await write(state, sent); } while (sent !== state.due);
      state.storing = null;
    })();
  };
  // Leaves the editor with the mask as it is painted, as it was, or without one; comes back where it cannot be saved.
  const finish = (how) => {
    const state = paint, now = painted(), data = how === "remove" ? null : now, same = now === state.before, inside = document.activeElement.closest(".painting, .mask-bar");
    const kept = how === "cancel" || (how === "done" && same), touched = () => Object.keys(state.was).length > 0;
    leave();
    if (inside) one("#mask-start").focus();
    easel.inTurn(async () => {
      await state.storing;
      if (!touched() && (kept || (data === null && !state.had))) return;
      const then = (work) => async () => { const done = await work(); if (done) await easel.load(); return done; };
      const undo = then(() => putBack(state)), redo = kept ? undo : then(() => write(state, data));
      if (!(await redo())) { open(state); return; }
      if (kept && same) return;
      const words = kept ? t("Mask as it was.") : data ? t("1 mask saved.") : t("1 mask removed.");
      easel.did(words, kept ? then(() => write(state, now)) : undo, redo);
    });
  };

  // Other actions of the page with images keep a mask in progress first.
  easel.leaveMask = (name) => { if (paint?.name && paint.name !== name) finish("done"); };
  addEventListener("pagehide", () => { if (paint?.name && (paint.pen || paint.storing)) post("mask", { picture: paint.name, png: painted() }, { keepalive: true }); });

  const pointAt = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas().getBoundingClientRect();
    return [(clientX - left) / width * canvas().width, (clientY - top) / height * canvas().height];
  };
  // One finger draws; a second one would join its places to those of the first.
  document.addEventListener("pointerdown", (event) => {
    if (!paint || event.target !== canvas() || event.button || !event.isPrimary) return;
    event.preventDefault();
    canvas().focus();
    canvas().setPointerCapture(event.pointerId);
    paint.at = paint.pen = pointAt(event);
    press(paint.pen);
    showTools();
  });
  document.addEventListener("pointermove", (event) => {
    if (!paint || event.target !== canvas() || !event.isPrimary) return;
    paint.at = pointAt(event);
    if (paint.pen && paint.tool !== "fill") { line(paint.pen, paint.at); paint.pen = paint.at; }
    showTools();
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, ({ isPrimary }) => { if (isPrimary && paint?.pen) { paint.pen = null; paint.stroke(); } });

  document.addEventListener("keydown", (event) => {
    if (!paint?.within.contains(event.target) || !event.target.closest(".painting, .mask-bar")) return;
    const key = event.key.toLowerCase(), control = event.ctrlKey || event.metaKey;
    const by = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[key], tool = TOOLS.find((name) => name[0] === key);
    const onCanvas = event.target === canvas();
    if (control && (key === "z" || key === "y")) stepBack(key === "y" || event.shiftKey);
    else if (control) return;
    else if (key === "escape") paint.end("done");
    else if (tool) paint.tool = tool;
    else if (key === "[" || key === "]") resize(paint.size * (key === "[" ? 0.8 : 1.25));
    else if (onCanvas && key === "enter") paint.end("done");
    else if (onCanvas && key === " ") { press(paint.at); paint.stroke(); }
    else if (onCanvas && by) paint.at = within(paint.at.map((at, axis) => at + by[axis] * Math.max(2, paint.size / 4)));
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (paint) showTools();
  }, true);

  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    if (target.id === "mask-start") easel.inTurn(start);
    else if (!paint?.within.contains(target)) return;
    else if (target.dataset.maskTool) { paint.tool = target.dataset.maskTool; showTools(); canvas().focus(); }
    else if (target.dataset.maskDo === "undo") stepBack(false);
    else if (target.dataset.maskDo) paint.end(target.dataset.maskDo);
  });
  document.addEventListener("input", ({ target }) => { if (paint && target.dataset.maskSize !== undefined) resize(Number(target.value)); });
})();
