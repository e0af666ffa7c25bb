// The page's own state: what was said, and the pictures of the next question.
const body = document.body
const find = (id) => document.getElementById(id)
const [log, welcome, tray, question, composer] = ["log", "welcome", "tray", "question", "composer"].map(find)
const [send, stop, file] = ["send", "stop", "file"].map(find)
const [temperature, maxTokens, key] = ["temperature", "max-tokens", "key"].map(find)
const number = new Intl.NumberFormat("en")
let messages = []
let attached = []
let running = null // what aborts the answer that is being written

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes)
  made.append(...children)
  return made
}

function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  return made
}

// ---- the server ----

function post(path, value, signal) {
  const headers = { "Content-Type": "application/json" }
  if (key.value) headers.Authorization = `Bearer ${key.value}`
  return fetch(path, { method: "POST", headers, body: JSON.stringify(value), signal })
}

async function refusal(response) {
  try {
    return (await response.json()).error.message
  } catch {
    return `the server answers with status ${response.status}`
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ""
  for (;;) {
    const { done, value } = await reader.read()
    if (done) throw new Error("the connection broke before the answer was complete")
    text += value
    const whole = text.split("\n\n")
    text = whole.pop()
    for (const line of whole) {
      const data = line.replace(/^data: /, "")
      if (data === "[DONE]") return
      const event = JSON.parse(data)
      if (event.error) throw new Error(event.error.message)
      yield event
    }
  }
}

async function watch() {
  const state = find("state")
  let found = "gone"
  try {
    found = (await (await fetch("/health", { cache: "no-store" })).json()).status
  } catch {}
  state.dataset.state = found
  state.textContent = { ok: "ready", gone: "not reachable" }[found] ?? found
  setTimeout(watch, found === "ok" ? 10000 : 1500)
}

// ---- pictures ----

const read = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader()
  reader.onload = () => resolve(reader.result)
  reader.onerror = () => reject(reader.error)
  reader.readAsDataURL(blob)
})

async function attach(files) {
  for (const blob of files) {
    if (!blob.type.startsWith("image/")) continue
    const url = await read(blob)
    const picture = { url, name: blob.name || "picture", plan: null }
    attached.push(picture)
    picture.card = figure(picture)
    const remove = element("button", { type: "button", className: "remove", textContent: "×", title: "Remove" })
    remove.setAttribute("aria-label", `Remove ${picture.name}`)
    remove.onclick = () => {
      attached = attached.filter((other) => other !== picture)
      picture.card.remove()
      refresh()
      question.focus()
    }
    picture.card.firstChild.append(remove)
    tray.append(picture.card)
    refresh()
    measure(picture)
  }
  question.focus()
}

async function measure(picture) {
  const caption = picture.card.querySelector("figcaption")
  try {
    const response = await post("/preview", { image: picture.url })
    if (!response.ok) throw new Error(await refusal(response))
    picture.plan = await response.json()
    show(picture.card, picture)
  } catch (error) {
    caption.textContent = error.message
    caption.className = "bad"
  }
}

function figure(picture) {
  const image = element("img", { src: picture.url, alt: picture.name })
  const card = element("figure", {}, element("div", { className: "stage" }, image), element("figcaption"))
  card.firstChild.style.setProperty("--ratio", 4 / 3)
  image.style.cssText = "inset:0; width:100%; height:100%; object-fit:contain"
  if (picture.plan) show(card, picture)
  return card
}

// The picture in the frame that its crops cover together, with the lines they are cut along.
function show(card, { plan, name }) {
  const [stage, caption] = [card.querySelector(".stage"), card.querySelector("figcaption")]
  const [x, y, width, height] = plan.frame
  const part = (length, whole) => `${(100 * length) / whole}%`
  stage.style.setProperty("--ratio", Math.min(Math.max(width / height, 1 / 4), 4))
  const image = stage.querySelector("img")
  image.style.cssText = ""
  Object.assign(image.style, {
    left: part(-x, width), top: part(-y, height), width: part(plan.width, width), height: part(plan.height, height),
  })
  const lines = drawn("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" })
  for (let i = 1; i < plan.columns; i++) lines.append(drawn("path", { class: "cut", d: `M${i / plan.columns} 0V1` }))
  for (let i = 1; i < plan.rows; i++) lines.append(drawn("path", { class: "cut", d: `M0 ${i / plan.rows}H1` }))
  stage.append(lines)
  const slices = plan.columns * plan.rows
  for (let i = 0; i < slices; i++) {
    const badge = element("span", { className: "badge", textContent: i + 1 })
    badge.setAttribute("aria-hidden", "true")
    badge.style.left = part(i % plan.columns, plan.columns)
    badge.style.top = part(Math.floor(i / plan.columns), plan.rows)
    stage.append(badge)
  }
  const cut = slices ? `${plan.columns} × ${plan.rows} slices and the whole` : "seen whole"
  const tokens = element("b", { textContent: `${number.format(plan.visual_tokens)} visual tokens` })
  const size = `${number.format(plan.width)}\u00a0×\u00a0${number.format(plan.height)}\u00a0pixels`
  caption.replaceChildren(tokens, ` · ${cut} · ${size}`)
  stage.querySelector("img").alt = `${name}, ${cut}`
}

// ---- the conversation ----

function refresh() {
  const text = question.value.trim()
  send.disabled = !text
  send.hidden = running !== null
  stop.hidden = running === null
  question.style.height = "auto"
  question.style.height = `${question.scrollHeight}px`
  find("temperature-shown").textContent = Number(temperature.value).toFixed(1)
}

function follow() {
  log.scrollTop = log.scrollHeight
}

function say(text, pictures) {
  welcome.hidden = true
  const turn = element("article", { className: "turn asked" })
  if (pictures.length) turn.append(element("div", { className: "pictures" }, ...pictures.map(figure)))
  turn.append(element("div", { className: "text", textContent: text }))
  log.append(turn)
  return turn
}

async function ask(text, pictures) {
  const parts = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }))
  const before = messages // another list after "New chat"
  const said = { role: "user", content: [...parts, { type: "text", text }] }
  const asked = say(text, pictures)
  const output = element("div", { className: "text" })
  const facts = element("div", { className: "facts" })
  const turn = element("article", { className: "turn answered writing" }, output, facts)
  log.append(turn)
  follow()
  running = new AbortController()
  refresh()
  const begun = performance.now()
  let answer = "", first = 0, usage = null, reason = ""
  const told = () => {
    const seconds = (performance.now() - begun) / 1000
    const tokens = (count, what) => `${number.format(count)} ${what}`
    const known = usage && [tokens(usage.prompt_tokens, "tokens asked"), tokens(usage.completion_tokens, "answered")]
    const ends = { length: "cut off at the longest answer", stopped: "stopped" }[reason]
    const times = [first && `first after ${(first / 1000).toFixed(1)} s`, `${seconds.toFixed(1)} s in all`]
    facts.textContent = [...(known ?? []), ...times, ends].filter(Boolean).join(" · ")
  }
  try {
    const response = await post("/v1/chat/completions", {
      model: body.dataset.model, messages: [...before, said], stream: true, stream_options: { include_usage: true },
      temperature: Number(temperature.value), max_tokens: Number(maxTokens.value) || undefined,
    }, running.signal)
    if (!response.ok) throw new Error(await refusal(response))
    for await (const event of events(response)) {
      usage = event.usage ?? usage
      const choice = event.choices[0]
      reason = choice?.finish_reason ?? reason
      const piece = choice?.delta.content
      if (!piece) continue
      first ||= performance.now() - begun
      answer += piece
      const near = log.scrollHeight - log.scrollTop - log.clientHeight < 80
      output.textContent = answer
      if (near) follow()
    }
    told()
  } catch (error) {
    if (error.name === "AbortError") {
      reason = "stopped"
      told()
    } else {
      turn.classList.add("failed")
      output.textContent = answer ? `${answer}\n\n${error.message}` : error.message
      answer = ""
    }
  }
  turn.classList.remove("writing")
  if (answer || before !== messages) {
    before.push(said, { role: "assistant", content: answer })
  } else { // it is not part of the conversation; what was asked can be sent once more
    if (reason === "stopped") turn.remove(), asked.remove()
    else if (!turn.classList.contains("failed")) output.textContent = "(an empty answer)"
    if (!question.value) question.value = text
    if (!attached.length) attach(await Promise.all(pictures.map(async ({ url, name }) => {
      const [head, data] = url.split(",")
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))
      return new File([bytes], name, { type: head.slice(5).split(";")[0] })
    })))
    welcome.hidden = log.querySelector(".turn") !== null
  }
  running = null
  refresh()
  follow()
  question.focus()
}

function submit() {
  const text = question.value.trim()
  if (running || !text) return
  const pictures = attached
  attached = []
  tray.replaceChildren()
  question.value = ""
  ask(text, pictures)
}

// ---- what the user does ----

composer.addEventListener("submit", (event) => { event.preventDefault(); submit() })
find("settings").querySelector("form").addEventListener("submit", (event) => event.preventDefault())
question.addEventListener("input", refresh)
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit() }
})
stop.addEventListener("click", () => running?.abort())
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return
  if (find("settings").open) { find("settings").open = false; find("settings").querySelector("summary").focus() }
  else running?.abort()
})
document.addEventListener("click", (event) => {
  if (!find("settings").contains(event.target)) find("settings").open = false
})
find("new").addEventListener("click", () => {
  running?.abort()
  messages = []
  log.querySelectorAll(".turn").forEach((turn) => turn.remove())
  welcome.hidden = false
  question.focus()
})
for (const id of ["attach", "drop"]) find(id).addEventListener("click", () => file.click())
file.addEventListener("change", () => { attach([...file.files]); file.value = "" })
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files]
  if (files.length) { event.preventDefault(); attach(files) }
})
document.addEventListener("dragover", (event) => { event.preventDefault(); body.classList.add("dragging") })
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) body.classList.remove("dragging") })
document.addEventListener("drop", (event) => {
  event.preventDefault()
  body.classList.remove("dragging")
  attach([...event.dataTransfer.files])
})
temperature.addEventListener("input", refresh)
key.addEventListener("input", () => sessionStorage.setItem("key", key.value))

find("key-row").hidden = body.dataset.wantsKey !== "yes"
key.value = sessionStorage.getItem("key") ?? ""
maxTokens.value = Math.min(512, Number(body.dataset.maxTokens))
refresh()
watch()
question.focus()
