// The Dataset tab's "What will be learned": what images have in common, share of steps per image, what the base
// says about captions and trigger words, and what the last run learned of each image.
(() => {
  const easel = window.easel;
  const { one, get, post, t } = easel;

  let state = {};             // of /easel/insights
  let odd = [];               // images with a wrong caption, by the check
  let sortMost = false;

  let seen = "";
  easel.showLearned = (check) => {
    if (check.state !== "done") return;
    odd = check.learned.filter((row) => row.kind === "odd").flatMap((row) => row.pictures);
    marked();
    easel.shares = new Map(check.shares.map((row) => [row.picture, row.share]));
    easel.tellAgain();
    if (check.fresh) seen = easel.shelf().mark;
  };

  // The check finds both problems and what will be learned.
  const look = async (asked = false) => easel.checked(await post("check", { by_itself: !asked }));

  // ---- measured with the base ---------------------------------------------------------------------------------------------
  const BUTTONS = { caption: "#caption-start", mask: "#masks-preview", captions: "#captions-start", pictures: "#pictures-start", triggers: "#trigger-propose" };
  const LINES = { caption: "#caption-line", mask: "#masks-line", captions: "#captions-state", pictures: "#pictures-state", triggers: "#trigger-state" };
  const PLACES = { captions: "#captions-found", pictures: "#pictures-found", triggers: "#trigger-found" };

  let wordsOpen = false;
  const show = () => {
    if (!one("#learned") || !state.html) return;
    for (const [what, { line: text, found, most }] of Object.entries(state.html)) {
      const now = state[what], button = one(BUTTONS[what]), line = one(LINES[what]), place = PLACES[what] && one(PLACES[what]), working = now.state === "working";
      button.disabled = working || Boolean(now.why);
      button.title = working ? t("It is being measured") : now.why || button.dataset.tip;
      one(`[data-insight-cancel=${what}]`).hidden = !working;
      line.className = now.state === "failed" ? "problem" : "small";
      easel.fill(line, text);
      if (!place) continue;
      place.hidden = !found;
      easel.fill(place, sortMost && what === "pictures" ? most : found);
    }
    for (const what of ["caption", "mask"]) easel.showAnnotator(what, state[what]);
    // Words are shown next to the trigger field, and only on request.
    one("#trigger-words").hidden = !wordsOpen;
    one("#pictures-order").hidden = !state.html.pictures.found;
    for (const button of easel.all("[data-learned-order]")) button.setAttribute("aria-pressed", (button.dataset.learnedOrder === "most") === sortMost);
    marked();
  };

  const marked = () => {
    const doubts = new Set(odd);
    if (state.captions?.fresh) for (const row of state.captions.found.rows) if (row.suspect) doubts.add(row.picture);
    const run = state.pictures?.found;
    easel.gains = new Map((run?.rows ?? []).map((row) => [row.picture, row]));
    if (state.pictures?.fresh) for (const row of run.rows) if (row.suspect) doubts.add(row.picture);
    easel.setDoubts(doubts);
  };

  const following = easel.inOrder(async () => {
    state = await get("insights");
    show();
  });
  const watch = () => following().catch(() => { /* the window is away; asked again when something changes */ });
  let measuring = false;
  easel.on("insights", ({ state: now }) => { if (measuring || now === "working") watch(); measuring = now === "working"; });
  const begin = async (body) => {
    const answer = await post("insights", body);
    if (answer.problem) {
      const line = one(LINES[body.what]);
      line.className = "problem";
      line.textContent = answer.problem;
      return;
    }
    state = answer;
    show();
    // An answer that is still under way may be older.
    watch();
  };

  // ---- events -------------------------------------------------------------------------------------------------------
  document.addEventListener("click", async (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const data = target.dataset;
    if (target.id === "learned-start") look(true);
    else if (target.id === "caption-start" || target.id === "masks-preview") {
      const what = target.id === "caption-start" ? "caption" : "mask";
      await easel.waitingSaves();
      begin({ do: "begin", what, ...easel.annotator(what) });
    }
    else if (target.id === "captions-start") { await easel.waitingSaves(); begin({ do: "begin", what: "captions" }); }
    else if (target.id === "pictures-start") begin({ do: "begin", what: "pictures" });
    else if (target.id === "trigger-propose") { wordsOpen = true; await easel.waitingSaves(); begin({ do: "begin", what: "triggers" }); }
    else if (target.id === "trigger-close") { wordsOpen = false; show(); one("#trigger-propose").focus(); }
    else if (data.triggerWord) easel.type(one("#trigger :is(input, textarea)"), data.triggerWord);
    else if (data.insightCancel) begin({ do: "cancel", what: data.insightCancel });
    else if (data.learnedWord) {
      const field = one("#dataset-search");
      field.value = data.learnedWord;
      field.dispatchEvent(new Event("input", { bubbles: true }));
      field.scrollIntoView({ block: "center" });
    }
    else if (data.learnedOrder) { sortMost = data.learnedOrder === "most"; show(); }
  });
  document.addEventListener("toggle", (event) => {
    if (event.target.id === "learned" && event.target.open) { look(); watch(); }
  }, true);

  let timer = null, mark = "";
  const watchSoon = (looks) => {
    clearTimeout(timer);
    timer = setTimeout(() => { if (one("#learned").open && looks()) look(); watch(); }, 600);
  };
  document.addEventListener("easel-shelf", () => {
    const shelf = easel.shelf();
    if (!one("#learned")) return;
    one("#trigger-propose").hidden = !shelf.pictures.length;
    if (shelf.mark === mark) return;
    mark = shelf.mark;
    watchSoon(() => shelf.mark !== seen);
  });
  // Availability depends on the run; results depend on trigger word and base.
  let before = "";
  easel.settling.push(() => {
    const meter = one("#dataset-mark")?.dataset.meter ?? "", now = `${one("[data-run-state]")?.dataset.runState} ${meter}`;
    if (now === before || !one("#learned") || !easel.shelf().mark) return;
    before = now;
    watchSoon(() => true);
  });
})();
