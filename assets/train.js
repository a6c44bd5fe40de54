// Client of the Train tab and the header: runs and queue, notifications, settings from a dropped file, quitting.
//
// Events are delegated to the document, as in window.js: the HTML is replaced during runs.
(() => {
  const { one, all, make, dialog, refill, t, toast, unwrap, request, later } = window.easel;

  // ---- notifications -----------------------------------------------------------------------------------
  const LIVE = ["preparing", "running", "pausing", "stopping"];
  const ENDS = {
    done: t("The run {name} is done"), stopped: t("The run {name} was stopped"), paused: t("The run {name} is paused"),
    failed: t("The run {name} failed"), interrupted: t("The run {name} was interrupted"),
  };
  const bell = {
    get on() { return localStorage.getItem("easel-tell") === "1" && "Notification" in window && Notification.permission === "granted"; },
    async toggle() {
      if (this.on) localStorage.removeItem("easel-tell");
      else if (!("Notification" in window)) return toast(t("This browser has no notifications; the page's title shows the state."));
      else if (await Notification.requestPermission() === "granted") localStorage.setItem("easel-tell", "1");
      else return toast(t("The browser does not allow notifications for this page; its settings can change that."), "bad");
      this.show();
      toast(this.on ? t("You get a notification when a run ends, while this page is open.") : t("No notification when a run ends."));
    },
    show() {
      const place = one("#tell-end");
      if (place && place.getAttribute("aria-pressed") !== String(this.on)) place.setAttribute("aria-pressed", this.on);
    },
  };
  let before = null;
  const watchEnd = () => {
    const bar = one("[data-run-state]");
    if (!bar) return;
    const now = bar.dataset.runState, name = bar.dataset.runName;
    if (before && LIVE.includes(before.state) && before.name === name && ENDS[now]) {
      window.easel.lastEnd = ENDS[now];
      if (bell.on) new Notification("LoRA Easel", { body: `${ENDS[now].replace("{name}", name)}${t(".")}`, icon: "/easel/assets/icon.svg" });
    }
    before = { state: now, name };
  };

  // ---- settings of a dropped file: only the header of a LoRA leaves the browser ----------------------------------------------------
  const takeHeader = async (file) => {
    const query = new URLSearchParams({ size: file.size, name: file.name });
    if (/\.(toml|json|ya?ml|sh|bat|cmd|ps1|txt)$/i.test(file.name)) {
      if (unwrap(await window.easel.send(`like?${query}`, await file.slice(0, 2 ** 20).arrayBuffer()))) refill();
      return;
    }
    const length = Number(new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
    if (!file.size || file.size < 8 || length > Math.min(file.size - 8, 2 ** 24)) {
      return toast(t("{name} is not a safetensors file.", { name: file.name }), "bad");
    }
    if (unwrap(await window.easel.send(`like?${query}`, await file.slice(0, 8 + length).arrayBuffer()))) refill();
  };

  // ---- quitting -------------------------------------------------------------------------------------------------------------
  // A page cannot start its server again, so this asks.
  const askToQuit = () => {
    const live = LIVE.includes(one("[data-run-state]")?.dataset.runState), name = one("[data-run-name]")?.dataset.runName;
    const textContent = `${t("Quit LoRA Easel?")}${live ? ` ${t("The run {name} continues.", { name })}` : ""}`;
    const button = (textContent, tone, value) => make("button", { className: `own ${tone}`, textContent, value });
    dialog(textContent, make("p", { textContent }), make("form", { className: "row", method: "dialog" }, button(t("Quit"), "primary", "yes"), button(t("Cancel"), "", "")))
      .addEventListener("close", ({ target }) => { if (target.returnValue) quit(); });
  };
  const quit = async () => {
    const reply = await request("quit", {});
    if (!reply) return;
    const runs = reply.run ? `${t(reply.queue ? "The run {name} continues, and so does the queue." : "The run {name} continues.", { name: reply.run })} ` : "";
    const box = dialog(t("Closed"), make("p", { textContent: t("LoRA Easel is closed. {runs}Start it again to come back; this page can be closed.", { runs }) }));
    box.id = "closed";
    box.addEventListener("cancel", (event) => event.preventDefault());
  };

  // What waits for its answer and is not sent again meanwhile: whether a button is disabled is the server's to say.
  const sent = new WeakSet();

  // ---- the rail: arrows go from run to run; Alt+arrows and dragging order the queue -------------------------------------
  const inTurn = window.easel.inTurns();
  const order = (body) => inTurn(() => request("queue", body));
  const RUN = "application/x-easel-run";
  const waitingAt = (event) => event.dataTransfer?.types.includes(RUN) && event.target.closest?.(".rail [data-place]");
  const markDrop = (at) => { for (const each of all(".rail [data-over]")) if (each !== at) delete each.dataset.over; if (at) at.dataset.over = ""; };
  document.addEventListener("dragstart", (event) => {
    const run = event.target.closest?.(".rail [data-place]");
    if (run) { event.dataTransfer.setData(RUN, run.dataset.job); event.dataTransfer.effectAllowed = "move"; }
  });
  document.addEventListener("dragover", (event) => { const at = waitingAt(event); if (at) event.preventDefault(); markDrop(at); });
  document.addEventListener("dragend", () => markDrop(null));
  document.addEventListener("drop", (event) => {
    const at = waitingAt(event);
    markDrop(null);
    if (!at) return;
    event.preventDefault();
    order({ do: "move", run: event.dataTransfer.getData(RUN), place: Number(at.dataset.place) });
  });
  document.addEventListener("keydown", (event) => {
    const fold = event.key === "Escape" && event.target.closest?.("#sweep[open]");
    if (fold) { fold.open = false; one("summary", fold).focus(); }
  });
  document.addEventListener("keydown", (event) => {
    const view = event.target.closest?.(".rail .view"), by = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[event.key];
    const moves = event.altKey && ["ArrowUp", "ArrowDown"].includes(event.key);
    if (!view || !by || event.ctrlKey || event.metaKey || (event.altKey && !moves)) return;
    event.preventDefault();
    const { job, place } = view.closest("li").dataset, views = all(".rail .view").filter((each) => each.offsetParent);
    if (!moves) return views[views.indexOf(view) + by]?.focus();
    if (place) order({ do: by < 0 ? "up" : "down", run: job });
  });

  // ---- the settings of a run come into the form, and go again -----------------------------------------------------------
  const giveBack = (to) => inTurn(async () => {
    if (to.project !== window.easel.project || !await request("settings/restore", to)) return;
    refill();
    toast(t("Undone: the form is as it was."));
  });
  const clone = (run) => inTurn(async () => {
    const answer = await request("settings/take", { run });
    if (!answer) return;
    const before = { ...answer.before, project: window.easel.project };
    refill();
    toast(t("The form has the settings of {run}: {settings} changed.", { run, settings: window.easel.plural(answer.new, "setting") }), "", () => giveBack(before));
  });
  document.addEventListener("submit", (event) => {
    if (event.target.id === "like-form") return inTurn(() => request("settings/import", { path: one("#like-path input").value })).then(refill);
    if (event.target.id !== "sweep-form" || sent.has(event.target)) return;
    sent.add(event.target);
    const values = one("#sweep-values"), problem = one("#sweep-problem"), name = one("#run-name :is(input, textarea)")?.value ?? "";
    inTurn(async () => {
      const [setting, by, by_values, seeds] = ["setting", "by", "by-values", "seeds"].map((id) => one(`#sweep-${id}`).value);
      const body = { setting, values: values.value, by, by_values, seeds, name };
      const answer = await window.easel.post("settings/sweep", body);
      sent.delete(event.target);
      problem.textContent = answer.problem ?? "";
      values.setAttribute("aria-invalid", Boolean(answer.problem));
      if (answer.problem) return values.focus();
      one("#sweep").open = false;
      one("#sweep summary").focus();
      toast(t("In the queue: {names}.", { names: answer.names }));
    });
  });

  // ---- one listener per event type -------------------------------------------------------------------------------------------
  const act = async (target, path, body) => {
    if (sent.has(target)) return;
    sent.add(target);
    started = ["resume", "accept"].includes(body.do);
    const answer = await request(path, body), project = answer?.place;
    sent.delete(target);
    const undo = () => act(target, "projects", { do: "restore", project }).then(() => window.easel.openRun(body.run));
    if (project) toast(t("{name} is in the trash.", { name: body.run }), "", undo);
    else if (typeof answer?.done === "string") toast(answer.done);
    // Changes of the draft come into the form.
    if (["reset", "rates"].includes(body.do)) refill();
  };
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, a");
    if (!target) return;
    const data = target.dataset;
    if (data.post) act(target, data.post, JSON.parse(data.body));
    // The tab asks for it when it opens, so it has to be stored before.
    else if (data.showPreview) request("run", { do: "see", run: data.showPreview }).then(() => window.easel.openTab("Preview"));
    else if (data.repair !== undefined) repair(target);
    else if (data.clone) clone(data.clone);
    else if (target.id === "start") { started = true; lookAtProblem(); }
    else if (target.id === "add-to-queue") lookAtProblem();
    else if (target.id === "all-settings") showSettings(!isOpen());
    else if (data.curves !== undefined) one("#run-chart .chart-box").focus();
    else if (target.id === "tell-end") bell.toggle();
    else if (target.id === "quit") askToQuit();
  });
  document.addEventListener("change", (event) => {
    if (event.target.id !== "like-file" || !event.target.files.length) return;
    takeHeader(event.target.files[0]);
    event.target.value = "";
  });
  // The run shown is in sight in the rail, once it was chosen.
  let seen = "";
  const showInRail = () => {
    const run = one(".rail [data-shown]"), rail = run?.closest(".rail");
    if (!run?.offsetParent || run.dataset.run === seen) return;
    seen = run.dataset.run;
    const [row, box] = [run.getBoundingClientRect(), rail.getBoundingClientRect()];
    if (row.left < box.left || row.right > box.right) rail.scrollLeft += row.left - box.left;
    if (row.top < box.top || row.bottom > box.bottom) rail.scrollTop += row.top - box.top;
  };

  // ---- another page of the same window ----------------------------------------------------------------------------------------
  // Each says hello once it can show a note, and each that was there answers.
  const channel = "BroadcastChannel" in window ? new BroadcastChannel("easel") : null;
  let greeted = false;
  window.easel.edited = () => channel?.postMessage("edited");
  const greet = () => {
    if (greeted || !channel || !one(".gradio-container")) return;
    greeted = true;
    channel.onmessage = ({ data }) => {
      if (data === "edited") return refill();
      toast(t("Also open in another tab. The last edit wins."));
      if (data === "hello") channel.postMessage("here");
    };
    channel.postMessage("hello");
  };

  // ---- wrong values are marked at their fields ---------------------------------------------------------------------------
  const OWN_IDS = { "train.steps": "steps", "train.resolution": "resolution", "model.base": "base-model" };
  const fieldOf = (name) => document.getElementById(OWN_IDS[name] ?? name.replace(/[._]/g, "-"));
  const markFields = () => {
    const wrong = new Map(all(":is(#start-why, #start-watch) [data-field]").map((each) => [fieldOf(each.dataset.field), each]));
    for (const notice of all(".page-train .field-problem")) {
      const field = notice.closest(".block[id]");
      if (wrong.has(field)) continue;
      for (const name of ["aria-invalid", "aria-describedby"]) one("input, textarea", field)?.removeAttribute(name);
      notice.remove();
    }
    for (const [field, line] of wrong) {
      const input = field && one("input, textarea", field), stops = Boolean(line.closest("#start-why"));
      if (!input) continue;
      let notice = one(".field-problem", field);
      if (!notice) field.append(notice = make("p", { id: `${field.id}-problem` }));
      notice.className = `${stops ? "problem" : "notes small"} field-problem`;
      if (notice.innerHTML !== line.innerHTML) notice.replaceChildren(...line.cloneNode(true).childNodes);
      // Gradio draws its inputs anew.
      if (input.getAttribute("aria-describedby") !== notice.id) input.setAttribute("aria-describedby", notice.id);
      if (input.getAttribute("aria-invalid") !== String(stops)) input.setAttribute("aria-invalid", stops);
    }
  };

  // ---- all settings are behind one row, which stays as it was left -----------------------------------------------------
  const isOpen = () => localStorage.getItem("easel-settings") === "1";
  const showSettings = (open = isOpen()) => {
    if (open !== isOpen()) localStorage.setItem("easel-settings", Number(open));
    document.documentElement.toggleAttribute("data-settings", open);
    const row = one("#all-settings");
    if (row && row.ariaExpanded !== String(open)) row.ariaExpanded = open;
  };
  // After Start was pressed in vain, the focus goes where that can be mended, once the answer has changed the foot.
  const lookAtProblem = async () => {
    await later(300);
    const line = one("#start-why li"), { field, group } = line?.dataset ?? {};
    if (!line || LIVE.includes(one("#run-status")?.dataset.state)) return;
    started = false;
    const input = () => all("input, textarea").find((each) => each.offsetParent && each.closest(".block[id]") === fieldOf(field));
    if (group) {
      showSettings(true);
      for (let tries = 20; tries && !input(); tries--) await later(100);
      markFields();
    }
    (input() ?? one("button", line) ?? one("#start-why")).focus();
  };
  const repair = (pressed) => {
    const name = pressed.closest("[data-field]")?.dataset.field;
    const field = name ? fieldOf(name) : pressed.closest(".block[id]"), input = field && one("input, textarea", field);
    if (input) window.easel.type(input, pressed.dataset.repair);
  };

  // After Start, the run is where one looks.
  let started = false;
  const lookAtRun = () => {
    const card = one("#run-status");
    if (!started || !card || !LIVE.includes(card.dataset.state)) return;
    started = false;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    card.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
    // The button is off in a moment, which loses the keyboard focus.
    if ([document.body, one("#start")].includes(document.activeElement)) card.focus({ preventScroll: true });
  };

  let arrived;
  const settle = () => {
    watchEnd();
    bell.show();
    markFields();
    lookAtRun();
    showInRail();
    // A downloaded base fills the form with its starting values.
    const now = one("#base-note")?.dataset.arrived ?? arrived;
    if (arrived !== undefined && now !== arrived) refill();
    arrived = now;
    greet();
    showSettings();
  };
  window.easel.settling.push(settle);
})();
