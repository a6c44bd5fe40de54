// Client of the Toolbox: what is filled in, and progress. The server renders the form of the chosen tool from what the page
// has filled in, and the results, which are kept by tool.
(() => {
  const { one, all, post, make, refill, t, openTab, fillParts, inOrder } = window.easel;
  const answers = {}, touched = {}, OTHER = ":other", FOLDER = ":folder";
  let tool = "check";

  // ---- the form ----------------------------------------------------------------------------------------------------
  const button = () => one(`#toolbox [data-tool="${tool}"]`);
  const needs = () => button().dataset.needs.split(" ");
  const value = (name) => one(`#toolbox-${name}`)?.value;
  const fileOf = (row) => {
    const [listed, strength, path] = ["listed", "strength", "path"].map((part) => one(`[data-part=${part}]`, row).value), other = listed === OTHER;
    return { file: other ? path : listed, strength, other };
  };
  const files = () => all(".toolbox-file").map(fileOf);
  // Lists follow the first file until they are set; a base that only a DoRA needs is set for one tool.
  const isSet = (name) => touched[name] && (touched[name] === tool || name !== "base" || !needs().includes("base?"));
  const lists = () => Object.fromEntries(["measure", "base"].filter(isSet).map((name) => [name, value(name)]));
  let turn = 0, answered = "", asked = {};
  const ask = inOrder(async () => {
    const mine = turn, kept = { by: value("by"), rank: value("rank"), format: value("format") }, changed = asked;
    asked = {};
    const reply = await post("toolbox/form", { tool, files: files(), ...kept, ...lists(), ...changed });
    // An older answer would take back what was filled in since.
    if (mine !== turn) asked = { ...changed, ...asked };
    if (mine !== turn || !reply.parts) return;
    fillParts(reply);
    for (const each of all("#toolbox .seg")) each.hidden = !each.contains(button());
    for (const each of all("#toolbox :is([data-tool], [data-verb])")) {
      const mine = (each.dataset.tool ?? each.dataset.verb).split(" ").includes(tool);
      if (mine) each.dataset.last = tool;
      each.setAttribute("aria-pressed", mine);
    }
    one("#toolbox-line").textContent = button().title;
    one("#toolbox-add").hidden = Number(button().dataset.high) < 2;
    one("#toolbox-go").textContent = button().dataset.go;
    if (answered !== tool) showAnswer();
    allow();
  });
  const draw = (changed = {}) => { turn += 1; Object.assign(asked, changed); return ask(); };
  const showAnswer = () => {
    const place = one("#toolbox-answer");
    answered = tool;
    if (answers[tool]) place.innerHTML = answers[tool];
    else place.replaceChildren(one("#toolbox-empty").content.cloneNode(true));
    const next = one("[data-next]", place);
    one("#toolbox-next").replaceChildren(...(next ? [next] : []));
    propose(true);
    window.charts.settle();
  };
  // What an answer leads to is the primary act, until something else is chosen.
  const propose = (wanted) => {
    const next = one("#toolbox-next").firstElementChild, first = Boolean(next && wanted);
    next?.classList.toggle("primary", first);
    one("#toolbox-go").classList.toggle("primary", !first);
    one("#toolbox-will").hidden = first;
    one("#toolbox-made").textContent = first ? next.dataset.next : "";
    if (!wanted && one("#toolbox-state").dataset.state === "error") tell("idle", "");
  };
  const choose = (name, changed = {}) => {
    tool = name;
    return draw({ rank: needs().includes("rank?") ? "" : value("rank") || "8", ...changed });
  };
  // Runs and files change; the first one is chosen until another is.
  const load = () => draw(files().some(({ file }) => file) ? {} : { files: [] });

  // ---- requests -----------------------------------------------------------------------------------------------------
  const base = () => (value("base") === OTHER ? value("other-base") : value("base"));
  const measure = () => {
    const run = value("measure");
    if (!needs().some((need) => need.startsWith("measure")) || run === "") return null;
    return run === FOLDER ? { dataset: value("dataset"), base: base() } : { run };
  };
  const start = async () => {
    const chosen = all(".toolbox-file:not([hidden])").map(fileOf).filter(({ file }) => file.trim()), fields = ["tuned", "by", "rank", "energy", "blocks", "format"];
    await begin("toolbox/start", { tool, files: chosen, base: needs().some((need) => need.startsWith("base")) ? base() : "", measure: measure(), apart: one("#toolbox-apart").checked, alphas: one("#toolbox-alphas").checked, ...Object.fromEntries(fields.map((name) => [name, value(name)])) });
  };
  const begin = async (path, body) => {
    propose(false);
    tell("working", "");
    picked = false;
    const { problem } = await inTurn(() => post(path, body));
    if (problem) tell("error", problem);
  };
  // The last click arrives last: a cancel that overtakes the start would cancel nothing.
  const inTurn = window.easel.inTurns();
  const tell = (state, words) => {
    const place = one("#toolbox-state");
    place.dataset.state = state;
    place.classList.toggle("problem", state === "error");
    if (place.textContent !== words) place.textContent = words;
    one("#toolbox-cancel").hidden = state !== "working";
    allow();
  };
  const allow = () => {
    const go = one("#toolbox-go"), why = one("#toolbox-why"), working = one("#toolbox-state").dataset.state === "working";
    why.hidden = working;
    go.disabled = working || why.textContent !== "";
    go.title = working ? t("A tool is running.") : why.textContent;
  };

  // ---- progress ------------------------------------------------------------------------------------------------------
  let revision = -1, picked = false;
  window.easel.on("toolbox", (now) => {
    if (!one("#toolbox")) return false;
    const working = now.state === "working", failed = now.state === "error", track = one("#toolbox-track");
    tell(working || failed ? now.state : "idle", failed ? make("div", { innerHTML: now.html }).textContent : now.words);
    track.hidden = !working;
    // Without a total the bar only moves.
    track.classList.toggle("preparing", !now.total);
    track.firstElementChild.style.width = now.total ? `${(100 * now.done) / now.total}%` : "100%";
    if (working || now.revision === revision) return;
    revision = now.revision;
    if (!now.html) return;
    if (!failed) answers[now.name] = now.html;
    // A choice made while the answer was on its way counts more.
    if (now.name !== tool && !picked) choose(now.name); else { if (!failed) showAnswer(); load(); }
  });

  // ---- events ------------------------------------------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const data = target.dataset;
    if ((data.tool || data.verb) && target.closest("#toolbox")) { picked = true; propose(false); choose(data.tool ?? data.last ?? data.verb.split(" ")[0]); }
    else if (target.id === "toolbox-add") draw({ files: [...files(), { file: "", strength: 1 }] });
    else if (data.part === "remove" && target.closest("#toolbox")) { target.parentElement.remove(); draw(); one("#toolbox-add").focus(); }
    else if (target.id === "toolbox-cancel") inTurn(() => post("toolbox/cancel", {}));
    else if (data.toolboxAct) begin("toolbox/act", { do: data.toolboxAct });
    else if (data.toolboxGoOn) post("toolbox/go-on", { file: data.toolboxGoOn }).then((reply) => {
      if (reply.problem) return tell("error", reply.problem);
      refill();
      openTab("Train");
    });
    else if (data.toolboxFile) inspect(data.toolboxFile);
  });
  // A tab that was never open is not in the page: its file waits until it is.
  let pending = null;
  const inspect = (file) => { pending = file; openTab("Toolbox"); if (seen) inspectPending(); };
  const inspectPending = async () => {
    if (!pending) return;
    const wanted = [{ file: pending, strength: 1 }];
    pending = null;
    await choose("check", { files: wanted });
    start();
  };
  window.easel.openLora = async (file) => {
    if (seen) tell("working", t("{name} is being read", { name: file.name }));
    const reply = await window.easel.upload("toolbox/file", file);
    if (!reply.problem) return inspect(reply.file);
    if (seen) tell("error", reply.problem); else window.easel.toast(reply.problem, "bad");
  };
  document.addEventListener("change", ({ target }) => {
    if (target.id !== "toolbox-upload" || !target.files.length) return;
    window.easel.openLora(target.files[0]);
    target.value = "";
  });
  document.addEventListener("submit", (event) => {
    if (event.target.id === "toolbox-form" && !one("#toolbox-go").disabled) start();
  });
  document.addEventListener("input", ({ target }) => {
    const row = target.closest(".toolbox-file");
    if (!row && !target.closest("#toolbox-form")) return;
    propose(false);
    if (!row) touched[target.id.replace("toolbox-", "")] = tool;
    const typed = target.value === OTHER && row;
    draw().then(() => { if (typed) one("[data-part=path]", row).focus(); });
  });
  // When the card appears and whenever its tab opens: runs and files change.
  let seen = null;
  window.easel.settling.push(() => {
    const card = one("#toolbox"), open = card?.offsetParent;
    if (!open) { seen = null; return; }
    if (seen === card) return;
    seen = card;
    load().then(inspectPending);
  });
})();
