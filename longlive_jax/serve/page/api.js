/** The server's HTTP interface, and the token, which is kept for this tab alone. */

const KEY = "longlive.token";

export function token() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setToken(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** A refusal in the server's own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** @returns {Promise<Response>} */
async function call(path, options = {}) {
  const headers = {...options.headers};
  if (token()) headers.authorization = `Bearer ${token()}`;
  let answer;
  try {
    answer = await fetch(new URL(path, document.baseURI), {...options, headers});
  } catch {
    throw new Refused(0, "the server cannot be reached");
  }
  if (answer.ok) return answer;
  const tree = await answer.json().catch(() => null);
  throw new Refused(answer.status, tree?.error?.message ?? `the server answered ${answer.status}`);
}

/** Whether the model has been compiled. */
export async function isReady() {
  return (await fetch(new URL("readyz", document.baseURI))).status === 200;
}

/** The model and its limits. */
export async function getModel() {
  return (await (await call("v1/models")).json()).data[0];
}

/** A session's prompts, by the block from which each holds. */
export async function getSession(id) {
  return (await call(`v1/sessions/${id}`)).json();
}

/** Why a connection cannot be had: "token", "starting", "lost" or "failed". */
export async function whyRefused() {
  try {
    if (!(await isReady())) return "starting";
    await getModel();
    return "lost";
  } catch (error) {
    if (error.status === 401) return "token";
    return error.status === 403 ? "failed" : "lost";
  }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/**
 * Has a script made into a file, which the server does from its prompts and seed.
 * @param {object} fields of POST /v1/videos
 * @param {(status: string, progress: number) => void} tell
 * @returns {Promise<Blob>}
 */
export async function makeFilm(fields, tell) {
  const headers = {"content-type": "application/json"};
  const body = JSON.stringify(fields);
  let film = await (await call("v1/videos", {method: "POST", headers, body})).json();
  while (film.status === "queued" || film.status === "in_progress") {
    tell(film.status, film.progress);
    await pause(500);
    film = await (await call(`v1/videos/${film.id}`)).json();
  }
  if (film.status !== "completed") throw new Refused(500, film.error?.message ?? film.status);
  const blob = await (await call(`v1/videos/${film.id}/content`)).blob();
  call(`v1/videos/${film.id}`, {method: "DELETE"}).catch(() => {}); // it is here now
  return blob;
}
