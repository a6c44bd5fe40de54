// The Dataset tab's mask editor: a canvas over the large image, white where the image counts. It is saved beside the
// image after each stroke; the former mask comes back with Cancel, and with Ctrl+Z once the editor is left.
(() => {
  const easel = window.easel;
  const { one, all, post, t } = easel;
  const MOST = 1024, MOST_STEPS = 30, TOOLS = ["brush", "eraser", "fill"];

  let paint = null;  // while a mask is edited: its image, context, tool, size, where the pen is, and what was before

  const canvas = () => one("#picture-big canvas");
  const png = () => canvas().toDataURL("image/png").split(",")[1];
  // The painted mask; null for nothing without a mask before.
  const painted = () => (paint.before === null && !snapshot().data.some((value, index) => index % 4 < 3 && value) ? null : png());
  const snapshot = () => paint.context.getImageData(0, 0, canvas().width, canvas().height);
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
    store();
  };

  const showTools = () => {
    for (const button of all("[data-mask-tool]")) button.setAttribute("aria-pressed", button.dataset.maskTool === paint.tool);
    one("#mask-size").value = paint.size;
    const ring = one("#picture-big .pen"), [x, y] = paint.at, { width, height } = canvas();
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

  // Not where another image was chosen meanwhile.
  const enter = (state) => {
    if (paint || easel.chosenPicture()?.name !== state.name) return;
    paint = state;
    one("#picture-big").classList.add("painting");
    one("#mask-bar").hidden = canvas().hidden = false;
    showTools();
    canvas().focus();
  };
  const start = async () => {
    const picture = easel.chosenPicture();
    if (!picture || paint) return;
    const place = canvas(), [wide, high] = picture.whole, scale = Math.min(1, MOST / Math.max(wide, high));
    [place.width, place.height] = [Math.max(1, Math.round(wide * scale)), Math.max(1, Math.round(high * scale))];
    const context = place.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "black";
    context.fillRect(0, 0, place.width, place.height);
    if (picture.mask) {
      const image = new Image();
      image.src = `/easel/picture/dataset/${picture.mask}`;
      await image.decode();
      context.drawImage(image, 0, 0, place.width, place.height);
    }
    const before = picture.mask ? png() : null, size = Math.round(Math.max(place.width, place.height) / 8);
    enter({ name: picture.name, before, context, tool: "brush", size, at: [place.width / 2, place.height / 2], past: [], future: [], pen: null });
  };

  const leave = () => {
    paint = null;
    one("#picture-big").classList.remove("painting");
    one("#mask-bar").hidden = canvas().hidden = one("#picture-big .pen").hidden = true;
  };
  // Writes a mask, or removes it with null; the first answer has the file that was there, as it was.
  const write = async (state, data) => {
    const answer = await post("mask", { picture: state.name, png: data }).catch((error) => ({ problem: error.message }));
    if (answer.problem) { easel.toast(answer.problem, "bad"); return false; }
    if (state.was === undefined) state.was = answer.before;
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
  const send = (state, data) => async () => {
    const done = await write(state, data);
    if (done) await easel.load();
    return done;
  };
  // Leaves the editor with the mask as it is painted, as it was, or without one; comes back where it cannot be saved.
  const finish = (data) => {
    const state = paint, { before } = state, now = painted(), inside = document.activeElement.closest("#picture-big, #mask-bar");
    leave();
    if (inside) one("#mask-start").focus();
    if (data === before && now === before && !state.storing) return;
    easel.inTurn(async () => {
      await state.storing;
      const back = () => state.was ?? null, kept = data === before;
      if (!(await send(state, kept && state.was !== undefined ? back() : data)())) { enter(state); return; }
      if (now === before && kept) return;
      const words = kept ? t("Mask as it was.") : data ? t("1 mask saved.") : t("1 mask removed.");
      easel.did(words, send(state, kept ? now : back() ?? (data ? null : before)), send(state, kept ? back() : data));
    });
  };
  const save = () => finish(painted());

  // What else the page does with images: a mask that is being painted is kept first.
  easel.leaveMask = (name) => { if (paint && paint.name !== name) save(); };
  addEventListener("pagehide", () => { if (paint?.pen || paint?.storing) post("mask", { picture: paint.name, png: painted() }, { keepalive: true }); });

  const pointAt = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas().getBoundingClientRect();
    return [(clientX - left) / width * canvas().width, (clientY - top) / height * canvas().height];
  };
  document.addEventListener("pointerdown", (event) => {
    if (!paint || event.target !== canvas() || event.button) return;
    event.preventDefault();
    canvas().focus();
    canvas().setPointerCapture(event.pointerId);
    paint.at = paint.pen = pointAt(event);
    press(paint.pen);
    showTools();
  });
  document.addEventListener("pointermove", (event) => {
    if (!paint || event.target !== canvas()) return;
    paint.at = pointAt(event);
    if (paint.pen && paint.tool !== "fill") { line(paint.pen, paint.at); paint.pen = paint.at; }
    showTools();
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { if (paint?.pen) { paint.pen = null; store(); } });

  document.addEventListener("keydown", (event) => {
    if (!paint || !event.target.closest?.("#picture-big, #mask-bar")) return;
    const key = event.key.toLowerCase(), control = event.ctrlKey || event.metaKey;
    const by = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[key], tool = TOOLS.find((name) => name[0] === key);
    const onCanvas = event.target === canvas();
    if (control && (key === "z" || key === "y")) stepBack(key === "y" || event.shiftKey);
    else if (control) return;
    else if (key === "escape") save();
    else if (tool) paint.tool = tool;
    else if (key === "[" || key === "]") resize(paint.size * (key === "[" ? 0.8 : 1.25));
    else if (onCanvas && key === "enter") save();
    else if (onCanvas && key === " ") { press(paint.at); store(); }
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
    else if (!paint) return;
    else if (target.dataset.maskTool) { paint.tool = target.dataset.maskTool; showTools(); canvas().focus(); }
    else if (target.id === "mask-undo") stepBack(false);
    else if (target.id === "mask-done") save();
    else if (target.id === "mask-remove") finish(null);
    else if (target.id === "mask-cancel") finish(paint.before);
  });
  document.addEventListener("input", (event) => { if (paint && event.target.id === "mask-size") resize(Number(event.target.value)); });
})();
