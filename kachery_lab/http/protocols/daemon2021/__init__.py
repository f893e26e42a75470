"""The node daemon of 2021, as kachery-client 1.2.0 uses it (wire facts: the older daemon's API).

| route | class | answer |
|---|---|---|
| `GET /probe` | open | node id and storage directory |
| `POST /probe`, `GET /stats` | browser | the same; counters |
| `GET /halt` | local | stops the server, where allowed |
| `POST /storeFile`, `/linkFile` | local | a file that the server can read itself |
| `POST /uploadFile`, `/createSignedFileUploadUrl` | local | a file into a channel's bucket; needs provideFiles |
| `POST /store`, `/loadFile`, `/downloadFileData` | browser | bytes in, a path, bytes out |
| `POST /feed/createFeed`, `/feed/deleteFeed` | local | |
| `POST /feed/getFeedId`, `getFeedInfo`, `appendMessages`, `getNumLocalMessages`, `watchForNewMessages` | browser | |
| `POST /mutable/get`, `set`, `delete` | browser | |
| `POST /task/requestTask`, `waitForTaskResult` | browser | needs requestTasks |
| `POST /task/registerTaskFunctions`, `updateTaskStatus`, `createSignedTaskResultUploadUrl` | browser | backends |

Class `local`: the two rotating codes, or a token with scope `client` or `admin`; `browser`: additional codes too.
"""

from kachery_lab.http.protocols.daemon2021.routes import routes

__all__ = ["routes"]
